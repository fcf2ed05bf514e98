"""Text files that list images with several labels, one file per part: "00000001_000.png 0 1 0 0", a name and a 0 or 1 for each label.

The published parts of ChestX-ray14 have this form (train_official.txt, val_official.txt and test_official.txt, 14 labels).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vitarium.data.parts import part_in
from vitarium.data.tables import Table
from vitarium.errors import DataError

LINE = re.compile(r"(\S.*?)((?:[ \t,]+[01])+)")


def find_label_lists(folder: Path) -> dict[str, Path]:
    """Return part ("train", "val", "test") -> the list of labels in a folder that names it; empty if there is no list for training.

    Raises:
        DataError: two lists of one part.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.txt")) if folder.is_dir() else []:
        part = part_in(file.stem)
        if part is None or not _is_list(file):
            continue
        if part in found:
            raise DataError(f"{found[part]} and {file} both list the part {part}; leave one of them in the folder")
        found[part] = file
    return found if "train" in found else {}


def _is_list(file: Path) -> bool:
    """Return whether the first line of a file is a name followed by labels."""
    try:
        with open(file, encoding="utf-8-sig") as text:
            return LINE.fullmatch(text.readline(4096).strip()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def read_label_lists(lists: dict[str, Path], names: Sequence[str] = ()) -> Table:
    """Read lists of labels by part into a table with the columns path, split and one for each label.

    Args:
        lists: part -> file.
        names: of the labels, used if a line has as many; else they are called "label 0", "label 1", ...

    Raises:
        DataError: a line of another form, or with another number of labels than the first.
    """
    rows: list[dict[str, str | None]] = []
    labels: list[str] = []
    for part, file in lists.items():
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file}: {error}; it should be text in UTF-8") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            found = LINE.fullmatch(line.strip())
            values = re.findall("[01]", found[2]) if found else []
            if found is None or (labels and len(values) != len(labels)):
                wanted = f"a name and {len(labels)} labels" if labels else "a name and labels"
                raise DataError(f"{file}, line {number}: {line.strip()[:80]!r} should be {wanted}, each 0 or 1")
            labels = labels or (list(names) if len(names) == len(values) else [f"label {i}" for i in range(len(values))])
            rows.append({"path": found[1], "split": part, **dict(zip(labels, values, strict=True))})
    first = next(iter(lists.values()))
    return Table(first, ["path", "split", *labels] if rows else [], rows)
