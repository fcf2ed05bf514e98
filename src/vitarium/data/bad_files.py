"""Handling of unreadable images: each is recorded and left out; too many of them stop the run."""

from __future__ import annotations

import os
from pathlib import Path

from vitarium.errors import DataError
from vitarium.files import write_text
from vitarium.texts import indented, printable


class BrokenImage(DataError):
    """An image that cannot be read. A loader records it and leaves it out.

    Attributes:
        path: the file, or the name of the sample in its archive.
        reason: the fault, in plain words.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.reason}"


class BadFiles:
    """Record of the unreadable images of a run, without duplicates.

    Args:
        limit: share of all images that may be unreadable before the run stops. One may be, whatever its share.
        total: number of images of the whole data set, of which a loader reads a part; None: the number that `check` is given.
    """

    def __init__(self, limit: float = 0.01, total: int | None = None):
        if not 0 <= limit <= 1:
            raise DataError(f"the share of images that may be broken must be from 0 to 1, got {limit}")
        self.limit, self.total = limit, total
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def record(self, path: str, reason: str) -> None:
        """Record an image; the same path counts once."""
        self._reasons.setdefault(path, reason)

    def items(self) -> list[tuple[str, str]]:
        """Return (path, reason) pairs, in the order of recording."""
        return list(self._reasons.items())

    def check(self, total: int) -> None:
        """Stop if more than one image, and more than `limit` of all, are broken.

        Args:
            total: number of images, if the record was not made for a whole data set.

        Raises:
            DataError: too many; lists the first twenty.
        """
        total = self.total or total
        if len(self) > max(self.limit * total, min(1, total - 1)):
            listed = indented([f"{path}: {reason}" for path, reason in self.items()], 20)
            share = f"{100 * len(self) / max(total, 1):.1f} %"
            raise DataError(
                f"{len(self)} of {total} images cannot be read ({share}; at most {100 * self.limit:g} %, or one image, may be broken):\n"
                f"{listed}\nrepair or remove them"
            )

    def write(self, folder: Path) -> None:
        """Write bad_files.txt into `folder`: path, tab, reason per line, with control characters as escapes; no file if there are none."""
        if self._reasons:
            lines = (f"{printable(path, '')}\t{printable(reason, '')}\n" for path, reason in self.items())
            write_text(folder / "bad_files.txt", "".join(lines))
