"""Processes that read data: their signals, their end, and a watch over the time that the main process waits for them.

Terminals and schedulers send SIGINT and SIGTERM to all processes of a command. The workers ignore both: the main process, which still needs
its batches, saves its state and ends them. What ends a worker is therefore SIGKILL.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

log = logging.getLogger("vitarium")

GRACE_SECONDS = 5.0
"""Seconds beyond the time-out after which stuck workers are ended. torch's own time-out does not cover tensors that a stopped worker has
only announced."""

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>

_STARTED: weakref.WeakSet[Any] = weakref.WeakSet()


def workers_of(loader: Any) -> list[Any]:
    """Return the processes of torch's `DataLoader` with persistent workers; [] before it started any, or for None."""
    return list(getattr(getattr(loader, "_iterator", None), "_workers", []))


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Start workers inside: they begin with SIGINT and SIGTERM blocked (see `start_worker`), and torch's SIGCHLD handler stays away.

    That handler raises at an arbitrary point of the main program when a worker dies. Without it the death of a worker is detected within
    five seconds, when the next batch is requested.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker(_: int, *, of_main_thread: bool = False) -> None:
    """Ignore SIGINT and SIGTERM in this worker, and let it end with its main process at once, where the system can do that.

    A worker that outlives a killed process keeps its connections open, so that the other processes of a training notice its end late.

    Args:
        of_main_thread: whether the main process starts it from its main thread (Linux ends the worker with the thread that started it).
    """
    if of_main_thread and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD})


def end_workers(processes: list[Any]) -> None:
    """Kill those workers that still run."""
    for process in processes:
        if process.is_alive():
            process.kill()


def end_at_exit(processes: list[Any]) -> None:
    """Kill these workers when the program exits, if they run still: Python would wait for them without end."""
    _register()
    _STARTED.update(processes)


@functools.cache
def _register() -> None:
    atexit.register(lambda: end_workers(list(_STARTED)))


class WaitingWatch:
    """Thread that watches the time between batches: it logs what is waited for, and ends workers that are stuck.

    Args:
        timeout: seconds without a batch after which the wait is logged. If no worker has gone on to another sample meanwhile, and torch has
            not noticed either, the workers are killed `GRACE_SECONDS` later, which the main process notices.
        reading: the sample that each worker reads, shared with the workers; -1: none.
        processes: the workers.
        where: returns in words what the workers are reading.

    Attributes:
        ended: whether workers were killed.
        found: what was found about them before that, for a message; "" for nothing.
    """

    def __init__(self, timeout: float, reading: Tensor, processes: list[Any], where: Callable[[], str]):
        self.timeout, self.reading, self.processes, self.where = timeout, reading, processes, where
        self.ended, self.found = False, ""
        self._over = threading.Event()
        self._since = 0.0
        self._waits = self._again = False
        self._first: list[int] = []
        self._changed = self._said = 0.0

    def __enter__(self) -> WaitingWatch:
        threading.Thread(target=self._run, daemon=True, name="vitarium-data-watch").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time of one wait for a batch, which goes on if it is entered again after torch's time-out."""
        if not self._again:
            now = time.monotonic()
            self._first, self._changed, self._said, self._since = self.reading.tolist(), now, now, now
        self._again = self._waits = True
        try:
            yield
            self._again = False
        finally:
            self._waits = False

    def busy(self) -> bool:
        """Return whether a worker went on to another sample within the time-out."""
        self._look(time.monotonic())
        return time.monotonic() - self._changed < self.timeout

    def _look(self, now: float) -> None:
        reading = self.reading.tolist()
        if reading != self._first:
            self._first, self._changed = reading, now

    def _run(self) -> None:
        pause = min(1.0, self.timeout / 4)
        while not self._over.wait(pause):
            since, now = self._since, time.monotonic()
            if not self._waits:
                continue
            self._look(now)
            if now - max(since, self._said) > self.timeout:
                self._said, self.found = now, self._stopped()
                log.warning("no batch for %.0f seconds: waiting for the data workers, %s%s", now - since, self.where(), self.found)
            if now - max(since, self._changed) > self.timeout + GRACE_SECONDS and self._waits and self._since == since:
                self.ended, self.found = True, self._stopped()
                end_workers(self.processes)
                return

    def _stopped(self) -> str:
        """Return which workers are stopped by a signal or wait for a disk, where the system shows it."""
        found = stopped_among(self.processes)
        return f"; {', '.join(found)}" if found else ""


def stopped_among(processes: Iterable[Any]) -> list[str]:
    """Return which processes are stopped by a signal or wait for a disk, in words; nothing where the system does not show it."""
    states = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk"}
    found = []
    for process in processes:
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [f"process {process.pid} is {states[state]}"] if state in states else []
    return found
