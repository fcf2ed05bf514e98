"""Execution of many runs: skip the finished ones, start the others, retry a failure once, report events.

A run is a picklable function of plain settings that writes into its own folder. The engine writes `result.json` there last, so that a
folder has either the whole result or none; the function resumes from its own checkpoints.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vitarium.engine.jobs import RESULT, Backend, Job, Message
from vitarium.engine.settings import Engine, as_engine
from vitarium.errors import NotSaved, TrainingStopped, UsageError, VitariumError

RETRIES = 1
"""Number of further attempts at a run that failed or lost its process or machine."""

Kind = Literal["kept", "started", "progress", "retried", "finished", "failed"]


@dataclass(frozen=True)
class RunEvent:
    """An event of one run.

    Args:
        kind: "kept": finished by an earlier call; "started": started or resumed; "progress": the function reported `value`; "retried": the
            run failed or was lost and starts again; "finished": `value` is its result; "failed": no further attempt, the others continue.
        job: the run.
        position: its place among the jobs, from 0.
        value: see `kind`.
        error: reason of "retried" and "failed".
        traceback: its traceback, as text.
    """

    kind: Kind
    job: Job
    position: int
    value: Any = None
    error: Exception | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run: a result (None in a further process of data-parallel training) or an error."""

    job: Job
    value: dict[str, Any] | None = None
    error: Exception | None = None
    kept: bool = False


def run_all(
    jobs: Sequence[Job],
    engine: str | Engine = "local",
    *,
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[RunEvent], None] = lambda event: None,
    fatal: Callable[[Exception], bool] = lambda error: False,
    retries: int = RETRIES,
) -> list[Outcome]:
    """Run every job that has no result yet, and return all outcomes in the order of the jobs.

    A run that fails, or loses its process or machine, is started again once (it resumes from the state in its folder); after a second
    failure the others continue. Errors for which a second attempt cannot help (`UsageError`, `DataError` ...) are not retried.

    Args:
        jobs: with distinct names and folders.
        engine: "local", "ray", or an `Engine` with all settings.
        address: of a Ray cluster, see `Engine`.
        workers: runs at a time, see `Engine.jobs`.
        progress: called in this process with every event.
        fatal: whether an error would occur in every other run as well; it is then raised at once.
        retries: of each run; 0 under launchers such as torchrun, whose processes must stay in step.

    Raises:
        UsageError: two jobs share a name or folder, or the folders are not on a disk that the cluster shares.
        MissingExtra: the engine is "ray" and Ray is not installed.
        KeyboardInterrupt: unfinished runs were asked to save and end.
    """
    _check(jobs)
    where = as_engine(engine, address=address, jobs=workers)
    kept = {i: there for i, job in enumerate(jobs) if (there := result_of(job)) is not None}
    for i, value in kept.items():
        progress(RunEvent("kept", jobs[i], i, value))
    outcomes: dict[int, Outcome] = {i: Outcome(jobs[i], value, kept=True) for i, value in kept.items()}
    rest = [i for i in range(len(jobs)) if i not in kept]
    if rest:
        outcomes |= _Batch(jobs, rest, where, progress, fatal, retries).run()
    return [outcomes[i] for i in range(len(jobs))]


class _Batch:
    """The runs of one call that have no result yet."""

    def __init__(
        self,
        jobs: Sequence[Job],
        rest: list[int],
        engine: Engine,
        progress: Callable[[RunEvent], None],
        fatal: Callable[[Exception], bool],
        retries: int,
    ):
        self.jobs, self.engine, self.fatal, self.retries = jobs, engine, fatal, retries
        self.waiting, self.running = deque(rest), set[int]()
        self.attempts = dict.fromkeys(rest, 0)
        self.outcomes: dict[int, Outcome] = {}
        self.send = progress

    def run(self) -> dict[int, Outcome]:
        """Return all outcomes by position."""
        backend = _backend(self.engine, lambda message: self.handle(message))
        try:
            while self.waiting or self.running:
                while self.waiting and backend.has_room(len(self.running)):
                    self.start(backend, self.waiting.popleft())
                for message in backend.messages():
                    self.handle(message)
        except BaseException:
            backend.close(cancel=True)
            raise
        backend.close(cancel=False)
        return self.outcomes

    def start(self, backend: Backend, position: int) -> None:
        job = self.jobs[position]
        if self.attempts[position] and (there := result_of(job)) is not None:  # it finished before its process was lost
            self.outcomes[position] = Outcome(job, there)
            return self.send(RunEvent("finished", job, position, there))
        self.attempts[position] += 1
        self.running.add(position)
        backend.start(position, job)

    def handle(self, message: Message) -> None:
        position, job = message.position, self.jobs[message.position]
        if position not in self.running:  # a late message of a finished run
            return
        if message.kind == "started":
            return self.send(RunEvent("started", job, position))
        if message.kind == "progress":
            return self.send(RunEvent("progress", job, position, message.value))
        self.running.remove(position)
        if message.kind == "done":
            if message.value is not None and result_of(job) is None:
                raise UsageError(
                    f"{job.name} is finished, but {job.folder / RESULT} is not here: the output folder must be on a disk that all "
                    "machines of the cluster share; choose another one"
                )
            self.outcomes[position] = Outcome(job, message.value)
            return self.send(RunEvent("finished", job, position, message.value))
        error = message.value
        if self.fatal(error):
            raise error
        if self.attempts[position] <= self.retries and worth_a_retry(error):
            self.waiting.append(position)
            return self.send(RunEvent("retried", job, position, error=error, traceback=message.traceback))
        self.outcomes[position] = Outcome(job, error=error)
        self.send(RunEvent("failed", job, position, error=error, traceback=message.traceback))


def worth_a_retry(error: Exception) -> bool:
    """Return whether a second attempt may succeed: not if the input, the data or the installation is wrong, or the disk is full."""
    return not isinstance(error, VitariumError) or (isinstance(error, TrainingStopped) and not isinstance(error, NotSaved))


def result_of(job: Job) -> dict[str, Any] | None:
    """Return the result of a finished run, or None if there is none or one of its files is missing."""
    try:
        found = json.loads((job.folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and all((job.folder / name).exists() for name in job.files) else None


def _check(jobs: Sequence[Job]) -> None:
    for what, values in (("name", [job.name for job in jobs]), ("folder", [str(job.folder) for job in jobs])):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise UsageError(f"two runs have the {what} {twice[0]!r}; each needs its own")


def _backend(engine: Engine, handle: Callable[[Message], None]) -> Backend:
    if engine.kind == "ray":
        from vitarium.engine.cluster import RayTasks

        return RayTasks(engine)
    from vitarium.engine.local import InProcess, Processes

    return InProcess(handle) if engine.in_process else Processes(engine, handle)
