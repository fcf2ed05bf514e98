"""Handling of unreadable images: each is recorded and left out; too many of them stop the run."""

from __future__ import annotations

import os
from pathlib import Path

from vitarium.errors import DataError
from vitarium.files import write_text


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
        limit: share of all images that may be unreadable before the run stops.
    """

    def __init__(self, limit: float = 0.01):
        if not 0 <= limit <= 1:
            raise DataError(f"the share of images that may be broken must be from 0 to 1, got {limit}")
        self.limit = limit
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
        """Stop if more than `limit` of `total` images are broken.

        Raises:
            DataError: too many; lists the first twenty.
        """
        if len(self) > self.limit * total:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in self.items()[:20])
            more = f"\n  and {len(self) - 20} more" if len(self) > 20 else ""
            share = f"{100 * len(self) / max(total, 1):.1f} %"
            raise DataError(
                f"{len(self)} of {total} images cannot be read ({share}; at most {100 * self.limit:g} % may be broken):\n{listed}{more}\n"
                "repair or remove them"
            )

    def write(self, folder: Path) -> None:
        """Write bad_files.txt into `folder`: path, tab, reason per line. Nothing is written if there are none."""
        if self._reasons:
            write_text(folder / "bad_files.txt", "".join(f"{path}\t{reason}\n" for path, reason in self.items()))
