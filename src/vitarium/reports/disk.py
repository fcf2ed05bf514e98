"""End of a comparison by a full or read-only disk: what was measured is kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from vitarium.engine import Job
from vitarium.engine.runs import result_of
from vitarium.errors import NotSaved, WriteError
from vitarium.files import FULL, write_error
from vitarium.reports.results import Failure, Trial


def of_disk(error: Exception) -> bool:
    """Return whether an error is that of a full or read-only disk."""
    return isinstance(error, NotSaved) or (isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS))


def measured(jobs: Sequence[Job], error: Exception) -> tuple[list[Trial], list[Failure], WriteError]:
    """Return what is left of a comparison after an error of the disk: the models that were measured, the others as failures, the error.

    Raises:
        WriteError: none was measured.
    """
    full = error if isinstance(error, WriteError) else as_write_error(error)
    found = {job.name: value for job in jobs if (value := result_of(job)) is not None}
    if isinstance(last := full.result, dict):  # measured, but not written
        found[last["name"]] = last
    if not found:
        raise full
    why = "not finished, because the disk is full or read-only"
    trials = [Trial.from_dict(found[job.name]) for job in jobs if job.name in found]
    return trials, [Failure(job.name, why) for job in jobs if job.name not in found], full


def as_write_error(error: Exception) -> WriteError:
    """Return the error of a full or read-only disk in the form that says what to do."""
    if isinstance(error, NotSaved) or not isinstance(error, OSError):
        return WriteError(str(error))
    return write_error(os.fsdecode(error.filename) if error.filename is not None else "a file", error)
