"""A look at every file of a data set before a training: broken ones are found in seconds, not after the training."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable
from typing import Any

from vitarium.cores import core_count
from vitarium.data.bad_files import BadFiles, BrokenImage
from vitarium.data.image_set import files_of, size_of
from vitarium.data.images import check_header, is_image_file
from vitarium.errors import DataError
from vitarium.texts import indented

CHECKED_FILES = 10_000
"""Largest number of samples of a data set whose files are all looked at; those of a larger set are checked when they are read."""

THREADS = 16


def check_headers(data: Any, bad_files: BadFiles) -> None:
    """Read the headers of all image files of a data set, in parallel, and record the broken ones.

    Args:
        data: an `ImageData`; samples that are no files (rendered, in archives), and videos, are not looked at.
        bad_files: the record of the run.

    Raises:
        DataError: more are broken than the record allows, or all files of one part.
    """
    if size_of(data) > CHECKED_FILES:
        return
    parts = {"training": files_of(data.train), "held-out": files_of(data.val)}
    reasons = broken_headers(file for files in parts.values() for file in files)
    for file, reason in reasons.items():
        bad_files.record(file, reason)
    bad_files.check(size_of(data))
    for part, files in parts.items():
        if files and all(file in reasons for file in files):
            listed = indented([f"{file}: {reasons[file]}" for file in files], 20)
            raise DataError(f"no image of the {part} part can be read:\n{listed}\nrepair or remove them")


def broken_headers(files: Iterable[str]) -> dict[str, str]:
    """Return {path: reason} of those image files whose headers cannot be read, in the given order."""
    images = [file for file in dict.fromkeys(files) if is_image_file(file)]
    with concurrent.futures.ThreadPoolExecutor(min(THREADS, 4 * core_count())) as pool:
        found = pool.map(_reason, images, chunksize=1)
        return {file: reason for file, reason in zip(images, found, strict=True) if reason is not None}


def _reason(file: str) -> str | None:
    try:
        check_header(file)
    except BrokenImage as error:
        return error.reason
    return None
