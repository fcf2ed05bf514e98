"""Training in several processes: choice of Fabric's strategy, and transport of errors, progress and signals between them.

A single command with `devices=2` spawns its processes itself. Under torchrun, SLURM or MPI the processes already exist, and Fabric takes
their rank and address from the environment. With strategy="fsdp" Fabric runs the command again for each device.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.multiprocessing
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import MPIEnvironment, SLURMEnvironment, TorchElasticEnvironment

from vitarium import errors
from vitarium.data.workers import stopped_among
from vitarium.errors import TrainingStopped, UsageError, VitariumError
from vitarium.training.sharding import sharded_strategy

log = logging.getLogger("vitarium")
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it logs every process, before our code runs in it

LISTENING_SECONDS, LEAVING_SECONDS = 0.05, 5.0
"""Seconds between looks for messages of other processes, and of waiting for the last one."""

STOPPED_SECONDS = 50.0
"""Seconds after which a process that is stopped is reported, and then again."""

LOST = ("connection closed", "connection reset", "connection refused", "nccl", "gloo", "broken pipe", "timed out", "process group")
"""Words in a RuntimeError of torch.distributed that indicate that another process has ended."""


def create_fabric(devices: int, num_nodes: int, strategy: str, accelerator: str, precision: str) -> Fabric:
    """Create a Fabric for these processes.

    Raises:
        UsageError: a count below one, or a setting that Fabric rejects (more devices than available, unknown strategy).
    """
    if devices < 1 or num_nodes < 1:
        raise UsageError(f"devices and num_nodes must be at least 1, got {devices} and {num_nodes}")
    if devices * num_nodes > 1 and strategy in ("auto", "ddp"):
        strategy = "ddp" if _started_from_outside() or num_nodes > 1 else "ddp_spawn"
    how: Any = sharded_strategy(devices * num_nodes) if strategy == "fsdp" else strategy
    try:
        return Fabric(accelerator=accelerator, strategy=how, devices=devices, num_nodes=num_nodes, precision=precision)  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        wanted = f"devices={devices}, num_nodes={num_nodes}, strategy={strategy!r}, accelerator={accelerator!r}"
        raise UsageError(f"cannot use {wanted}: {error}") from error


def _started_from_outside() -> bool:
    environments = (TorchElasticEnvironment, SLURMEnvironment, MPIEnvironment)
    return "LOCAL_RANK" in os.environ or any(environment.detect() for environment in environments)


def spawns(fabric: Fabric) -> bool:
    """Return whether this process has to start the others itself, by spawning a function."""
    from lightning_fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    return isinstance(fabric.strategy.launcher, _MultiProcessingLauncher)


def run_in_processes(fabric: Fabric, work: Callable[..., Any], arguments: tuple[Any, ...], progress: Callable[[Any], None] | None) -> None:
    """Run `work(fabric, *arguments, progress)` in the processes of a spawning Fabric; errors and interrupts are raised here.

    Raises:
        VitariumError: the first error raised by `work` in any of them.
        TrainingStopped: one of them was killed.
        KeyboardInterrupt: they were interrupted, and have saved a checkpoint.
    """
    try:
        task = pickle.dumps((work, arguments))
    except Exception as error:  # pickling can raise anything
        raise UsageError(
            f"the learner or the data cannot be sent to other processes ({error}); start the processes with torchrun instead"
        ) from error
    channel = torch.multiprocessing.get_context("spawn").SimpleQueue()
    endings: list[tuple[str, str]] = []
    watch = _StoppedWatch()
    over = threading.Event()  # not a message: a killed process may keep the lock for writing

    def listen() -> None:
        while not channel.empty() or not over.wait(LISTENING_SECONDS):
            watch.look()
            if channel.empty():
                continue
            kind, content = channel.get()
            if kind == "progress":
                if progress:
                    progress(content)
            else:
                endings.append((kind, content))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    failure: Exception | None = None
    port = os.environ.get("MASTER_PORT")
    with _ForwardedSignals():
        try:
            fabric.launch(_work_in_child, task, channel, progress is not None)
        except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
            failure = error
        finally:
            over.set()
            listener.join(LEAVING_SECONDS)  # half a message of a killed process has no end
            if port is None:
                os.environ.pop("MASTER_PORT", None)  # Fabric leaves it set, and the next run would use a port that may be taken
    if endings:
        kind, message = endings[0]
        raise KeyboardInterrupt(message) if kind == "KeyboardInterrupt" else getattr(errors, kind)(message)
    if isinstance(failure, torch.multiprocessing.ProcessExitedException):
        raise TrainingStopped(
            f"{str(failure).splitlines()[0]} (out of memory is a common cause); the others were ended; run again: training continues "
            "from the last checkpoint"
        ) from failure
    if failure:
        raise failure


class _StoppedWatch:
    """Warn of spawned processes that are stopped, for which the others wait in silence until torch.distributed's time-out."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._found: list[str] = []
        self._since = self._looked = time.monotonic()

    def look(self) -> None:
        """Look at the processes at intervals of `STOPPED_SECONDS` / 10, and warn of those that were stopped for `STOPPED_SECONDS`."""
        now = time.monotonic()
        if now - self._looked < STOPPED_SECONDS / 10:
            return
        self._processes = self._processes or multiprocessing.active_children()  # once, because it also collects ended ones
        self._looked, found = now, stopped_among(self._processes)
        if not found or found != self._found:
            self._found, self._since = found, now
        elif now - self._since > STOPPED_SECONDS:
            log.warning(
                "the training waits: for %.0f seconds %s; kill -CONT continues a stopped process", now - self._since, ", ".join(found)
            )
            self._since = now


def _work_in_child(fabric: Fabric, *given: Any) -> None:
    """Run the work in a spawned process, and send its result or error to the parent.

    After an error the process exits at once, with an exit code on which the parent ends the others: Python's normal exit would wait for
    threads of torch.distributed, which wait for the other processes.
    """
    task, channel, wants_progress = given
    work, arguments = pickle.loads(task)
    report = (lambda progress: channel.put(("progress", progress))) if wants_progress else None
    try:
        work(fabric, *arguments, report)
    except KeyboardInterrupt as error:
        _ignore_signals()
        channel.put(("KeyboardInterrupt", str(error)))
        os._exit(130)
    except VitariumError as error:
        _ignore_signals()
        kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
        channel.put((kind, str(error)))
        os._exit(error.exit_code)


def _ignore_signals() -> None:
    """Ignore the signals that end a process, so that its last message is sent as a whole."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def same_on_all(fabric: Fabric, *flags: bool) -> tuple[bool, ...]:
    """Return each flag, true if it is true in any process; one small message, none in a single process."""
    if fabric.world_size == 1:
        return flags
    votes = fabric.all_reduce(torch.tensor(flags, dtype=torch.float32, device=fabric.device), reduce_op="max")
    return tuple(bool(vote) for vote in votes.tolist())  # type: ignore[union-attr]


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Convert torch.distributed's error about a lost peer to `TrainingStopped`."""
    try:
        yield
    except RuntimeError as error:
        lost = torch.distributed.is_initialized() and any(word in str(error).lower() for word in LOST)
        if isinstance(error, VitariumError) or not lost:
            raise
        what = re.sub(r"^\[[^]]*\]\s*", "", str(error).splitlines()[0]).split(". ")[0]  # without gloo's source line and advice
        raise TrainingStopped(
            f"another process of this run has ended ({what}); run again: training continues from the last checkpoint"
        ) from error


class _ForwardedSignals:
    """Forward SIGINT and SIGTERM to the children as SIGTERM while entered; they save a checkpoint and end, then this process ends."""

    def __enter__(self) -> None:
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._forward)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @staticmethod
    def _forward(number: int, frame: Any) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
