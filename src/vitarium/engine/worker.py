"""Functions for worker processes of any engine."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.engine.jobs import RESULT
from vitarium.errors import UsageError, WriteError
from vitarium.files import lock_folder, write_json

if TYPE_CHECKING:
    from vitarium.engine.jobs import Job, Report

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LEAVING_SECONDS = 60.0
"""Seconds that a run waits until an earlier attempt on a lost machine releases its folder."""


def execute(job: Job, report: Report) -> dict[str, Any] | None:
    """Run a job in this process; its result is written last.

    Raises:
        WriteError: the result cannot be written; `error.result` is the result.
        any error of the job's function.
    """
    value = job.function(job.folder, report, **job.settings)
    if value is not None:
        try:
            write_json(job.folder / RESULT, value)
        except WriteError as error:
            error.result = value
            raise
    return value


def prepare(threads: int | None, folder: str | None = None) -> None:
    """Set up a new worker process like the calling one: working folder, threads, and no variables of a launcher.

    Args:
        threads: of PyTorch; None: unchanged.
        folder: working folder of the caller, for relative paths; skipped if this machine does not have it.
    """
    for name in [n for n in os.environ if n in LAUNCHERS or n.startswith("SLURM_")]:
        del os.environ[name]  # a cluster started by srun passes these on, and training would treat the run as one of several processes
    if folder is not None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads))  # torch reads it at import; a run may not need torch
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(max(1, threads))


def wait_until_free(folder: Path) -> None:
    """Wait until no other process holds a run's folder; one that lost its connection needs some time to end.

    Raises:
        UsageError: it is still held after `LEAVING_SECONDS`.
    """
    end = time.monotonic() + LEAVING_SECONDS
    while True:
        try:
            with lock_folder(folder):
                return
        except UsageError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def portable(error: Exception) -> tuple[Exception, str]:
    """Return a picklable form of an error, and its traceback as text."""
    text = "".join(traceback.format_exception(error))
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error, text
    except Exception:  # pickling an exception can raise anything
        pass
    return nearest_kind(error), text


def nearest_kind(error: Exception) -> Exception:
    """Return an error with the same message, of the nearest base class that takes only a message."""
    message = str(error)
    for kind in type(error).__mro__:
        with contextlib.suppress(Exception):
            made = kind(message)
            if isinstance(made, Exception) and type(pickle.loads(pickle.dumps(made))) is kind and str(made) == message:
                return made
    return RuntimeError(f"{type(error).__name__}: {message}")
