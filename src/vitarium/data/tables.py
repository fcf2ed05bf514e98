"""CSV files that list images: their columns of paths, labels, parts and groups."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from vitarium.assignments import split_assignment
from vitarium.data.parts import few, part_of
from vitarium.errors import DataError, UsageError, nearest

PATH_COLUMNS = ("path", "image index", "image", "file", "filename", "file_name", "filepath", "image_path", "image_id")
PART_COLUMNS = ("split", "subset", "part", "partition", "set", "phase", "fold")
HELD_OUT_COLUMNS = ("is_valid", "is_val", "is_validation", "is_test")
"""Columns that mark the held-out images by 1 or True."""
GROUP_COLUMNS = ("patient", "patient id", "subject", "subject id", "case id", "person id", "group", "group id")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")
SEPARATORS = {"pipe": "|", "semicolon": ";", "comma": ",", "space": " ", "slash": "/", "none": ""}
"""Separators of the labels in a column of several, by the names that an option has for them."""


@dataclass(frozen=True)
class TableOptions:
    """Options of a CSV file, as in "csv:FILE,labels=Cat+Dog,group=PatientID".

    Attributes:
        path: column of the images' paths.
        labels: column of the labels; or the columns of 0 and 1, with + between them.
        separator: what separates several labels in a column, one of `SEPARATORS`.
        group: column of the groups that are not divided, such as patients; "none": images are divided singly.
        split: column of the parts; "none": the table's parts are not used.
        fold: value of the column `split` (or fold) that marks the held-out images.
    """

    path: str = ""
    labels: str = ""
    separator: str = ""
    group: str = ""
    split: str = ""
    fold: str = ""

    def __post_init__(self) -> None:
        if self.separator and self.separator not in SEPARATORS:
            raise UsageError(f"separator must be one of {', '.join(SEPARATORS)}; got {self.separator!r}")


def parse_options(text: str) -> tuple[Path, TableOptions]:
    """Parse "FILE,KEY=VALUE,..." after "csv:".

    Raises:
        UsageError: an option that does not exist, or is given twice.
    """
    if Path(text).exists():
        return Path(text), TableOptions()
    name, *assignments = text.split(",")
    known = [field.name for field in fields(TableOptions)]
    values = {}
    for assignment in assignments:
        accepted = f"options of tables are {', '.join(f'{key}=' for key in known)}"
        key, value = split_assignment(assignment, accepted)
        if key not in known or not value:
            raise UsageError(f"tables have no option {assignment!r}{nearest(key, known)} ({accepted})")
        if key in values:
            raise UsageError(f"csv:{text} sets {key} twice; leave one out")
        values[key] = value
    return Path(name), TableOptions(**values)


class Table:
    """Rows of a CSV file.

    Args:
        path: of the file.
        names: of its columns.
        rows: cells of each row by column.

    Attributes:
        used: columns that were found by `find`.
    """

    def __init__(self, path: Path, names: list[str], rows: list[dict[str, str | None]]):
        self.path, self.names, self.rows = path, names, rows
        self.used: set[str] = set()

    def find(self, accepted: Iterable[str], named: str = "") -> str | None:
        """Return the column that the user named, else the first one with an accepted name, in any case and spelling; None without one.

        Raises:
            DataError: there is no column of the name that the user gave.
        """
        by_name = {_plain(name): name for name in reversed(self.names)}
        if named:
            if named not in self.names and _plain(named) not in by_name:
                raise DataError(f"{self.path} has no column {named!r}{nearest(named, self.names)} (it has {few(self.names, 12)})")
            found: str | None = named if named in self.names else by_name[_plain(named)]
        else:
            found = next((by_name[_plain(name)] for name in accepted if _plain(name) in by_name), None)
        if found is not None:
            self.used.add(found)
        return found

    def column(self, name: str) -> list[str]:
        """Return the cells of a column without surrounding spaces; "" where a row is too short."""
        return [(row.get(name) or "").strip() for row in self.rows]

    def place(self, options: TableOptions) -> str | None:
        """Return the column of the images' paths."""
        return self.find(PATH_COLUMNS, options.path)

    def unused(self, used: Iterable[str]) -> list[str]:
        """Return a note that names the columns which nothing has used; no note if there are none."""
        rest = [name for name in self.names if name not in self.used and name not in used]
        return [f"{self.path}: columns that are not used: {few(rest, 12)}"] if rest else []

    def groups(self, options: TableOptions) -> tuple[list[str] | None, list[str]]:
        """Return the group of each row (None without groups), and notes. Rows without an entry are groups of their own."""
        name = None if options.group == "none" else self.find(GROUP_COLUMNS, options.group)
        if name is None:
            return None, []
        cells = [cell or f"row {number}" for number, cell in enumerate(self.column(name), 2)]
        return cells, [f"{self.path}: images of one {name} are kept in one part ({len(set(cells))} groups); group=none divides them singly"]

    def parts(self, options: TableOptions) -> tuple[dict[str, list[int]], list[str]]:
        """Return row numbers by part ("" if the table has no parts), and notes.

        Raises:
            DataError: a column split whose entries name no parts.
        """
        everything = {"": list(range(len(self.rows)))}
        if options.split == "none":
            return everything, []
        marked = self.find(HELD_OUT_COLUMNS, "") if not options.split and not options.fold else None
        if marked is not None:
            cells = [cell.lower() for cell in self.column(marked)]
            if set(cells) <= {*YES, *NO}:
                held = "test" if _plain(marked) == "istest" else "val"
                rows = {
                    "train": [i for i, cell in enumerate(cells) if cell in NO],
                    held: [i for i, cell in enumerate(cells) if cell in YES],
                }
                if all(rows.values()):
                    return rows, [f"{self.path}: the column {marked} gives the parts"]
        name = self.find(("fold", *PART_COLUMNS) if options.fold else PART_COLUMNS, options.split)
        if name is None:
            return everything, []
        cells = self.column(name)
        if options.fold:
            return self._fold(name, cells, options.fold)
        return self._named(name, cells, everything, certain=bool(options.split) or _plain(name) == "split")

    def _fold(self, name: str, cells: list[str], fold: str) -> tuple[dict[str, list[int]], list[str]]:
        rows = {
            "train": [i for i, cell in enumerate(cells) if cell != fold],
            "val": [i for i, cell in enumerate(cells) if cell == fold],
        }
        if not all(rows.values()):
            raise DataError(f"{self.path}: fold={fold} leaves a part empty; the column {name} has {few(sorted(set(cells)))}")
        return rows, [f"{self.path}: the rows with {name} {fold} are held out"]

    def _named(
        self, name: str, cells: list[str], everything: dict[str, list[int]], certain: bool
    ) -> tuple[dict[str, list[int]], list[str]]:
        parts = {cell: part_of(cell) for cell in set(cells)}
        rows = {
            part: [i for i, cell in enumerate(cells) if parts[cell] == part] for part in ("train", "val", "test") if part in parts.values()
        }
        if not rows or ("train" not in rows and len(set(cells)) > len(rows)):
            if certain:
                raise DataError(f"{self.path}: the column {name} has {few(sorted(set(cells)))}; it needs train (and val)")
            advice = f"fold=VALUE in csv:{self.path},fold=VALUE holds one value out"
            return everything, [f"{self.path}: the column {name} ({few(sorted(set(cells)), 3)}) names no parts and is not used; {advice}"]
        other = sum(part is None for part in map(parts.__getitem__, cells))
        left = f"; {other} rows with other entries are left out" if other else ""
        return rows, [f"{self.path}: the column {name} gives the parts{left}"]


def read_table(path: Path) -> Table:
    """Read a CSV file with commas, semicolons or tabs between the columns.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as text:
            first = text.readline()
            text.seek(0)
            delimiter = next((d for d in (",", ";", "\t") if d in first), ",")
            reader = csv.DictReader(text, delimiter=delimiter)
            rows = list(reader)
            names = [name.strip() for name in reader.fieldnames or [] if name]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; it should be a CSV file in UTF-8") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has several columns of one name: {few(twice)}; rename them")
    cleaned = [{(name or "").strip(): value for name, value in row.items() if isinstance(value, str)} for row in rows]
    return Table(path, names if rows else [], cleaned)  # type: ignore[arg-type]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
