"""Execution on this machine: in the calling process, or several runs at a time in separate processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from vitarium.cores import core_count
from vitarium.engine.jobs import Job, Message
from vitarium.engine.settings import Engine
from vitarium.engine.worker import execute, portable, prepare, wait_until_free
from vitarium.errors import TrainingStopped

POLL_SECONDS = 0.2
STOPPING_SECONDS = 30.0
"""Seconds in which stopped processes can save their state."""


class InProcess:
    """Execution of one run after the other in the calling process.

    Args:
        handle: called with each message at once, because there is no polling during a run.
    """

    def __init__(self, handle: Callable[[Message], None]):
        self.handle = handle

    def has_room(self, running: int) -> bool:
        return not running

    def start(self, position: int, job: Job) -> None:
        self.handle(Message("started", position))
        try:
            value = execute(job, lambda value: self.handle(Message("progress", position, value)))
        except Exception as error:
            return self.handle(Message("failed", position, error, "".join(traceback.format_exception(error))))
        self.handle(Message("done", position, value))

    def messages(self) -> Iterator[Message]:
        return iter(())

    def close(self, *, cancel: bool) -> None:
        pass


class Processes:
    """Execution of each run in its own process, `engine.jobs` at a time.

    Args:
        engine: of kind "local".
        handle: called when a process is started.
    """

    def __init__(self, engine: Engine, handle: Callable[[Message], None]):
        import torch

        self.handle = handle

        self.jobs = engine.jobs or 1
        self.threads = max(1, int(engine.cpus or core_count() / self.jobs))
        self.devices = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else torch.cuda.device_count()
        self.context = multiprocessing.get_context("spawn")
        self.running: dict[Connection, tuple[int, Any, int]] = {}

    def has_room(self, running: int) -> bool:
        return running < self.jobs

    def start(self, position: int, job: Job) -> None:
        ours, theirs = self.context.Pipe()
        slot = min(set(range(self.jobs)) - {slot for _, _, slot in self.running.values()})
        device = slot % self.devices if self.devices > 1 else None
        process = self.context.Process(target=_child, args=(theirs, job, self.threads, device), name=job.name)
        process.start()
        theirs.close()
        self.running[ours] = position, process, slot
        self.handle(Message("started", position))

    def messages(self) -> Iterator[Message]:
        for connection in wait(list(self.running), POLL_SECONDS):
            assert isinstance(connection, Connection)
            position, process, _ = self.running[connection]
            try:
                kind, value, text = connection.recv()
            except (EOFError, OSError):
                kind, value, text = "failed", None, ""
            if kind == "progress":
                yield Message(kind, position, value)
                continue
            process.join()
            del self.running[connection]
            connection.close()
            if value is None and kind == "failed":
                value = TrainingStopped(f"its process ended with exit code {process.exitcode}{_why(process.exitcode)}")
            yield Message(kind, position, value, text)

    def close(self, *, cancel: bool) -> None:
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.join(STOPPING_SECONDS)
            if process.is_alive():
                process.kill()
        self.running.clear()


def _why(code: int | None) -> str:
    return " (killed: out of memory?)" if code in (-9, 137) else ""


def _child(connection: Connection, job: Job, threads: int, device: int | None) -> None:
    """Main function of a run's process. `device` is the number of its GPU, if this machine has several."""
    prepare(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)

    def report(value: Any) -> None:
        connection.send(("progress", value, ""))

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # stopped, or the parent has ended; the run has saved its state
        try:
            wait_until_free(job.folder)
            value = execute(job, report)
        except BrokenPipeError:
            raise
        except Exception as error:
            connection.send(("failed", *portable(error)))
        else:
            connection.send(("done", value, ""))
