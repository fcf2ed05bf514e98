"""Images with several binary labels each: rendered, from a CSV file, or in the layout of NIH's ChestX-ray14."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data.folders import FileImages
from vitarium.data.image_set import ImageData
from vitarium.data.label_lists import find_label_lists, read_label_lists
from vitarium.data.parts import chosen, divide, few, split_groups
from vitarium.data.scan import find_images
from vitarium.data.tables import SEPARATORS, Table, TableOptions, parse_options, read_table
from vitarium.errors import DataError, nearest

if TYPE_CHECKING:
    from PIL import Image

Labels = NDArray[np.float32]
"""Labels of an image, (classes,): 1 present, 0 absent, NaN unknown."""

log = logging.getLogger("vitarium")

CHEST_FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""Classes of ChestX-ray14, in the order of its published models."""
NOTHING = ("No Finding", "No finding", "none", "")
"""Entries that stand for an empty list of labels."""
LIST_COLUMNS = ("labels", "finding labels", "findings", "tags", "label", "classes", "categories", "attributes", "target", "targets")
NOT_LABELS = ("sex", "gender", "male", "female", "age", "view", "laterality", "frontal", "orientation", "id", "index", "fold", "weight")
"""Columns that describe an image or a patient: they are labels only if they are named, even if they hold only 0 and 1."""
VALUES = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "-1": np.nan, "-1.0": np.nan}
"""Accepted entries in a column of one label; -1 is CheXpert's "uncertain"."""
ACCEPTED = (
    "accepted for several labels per image: scenes[:task=thorax]; a folder in the layout of NIH's ChestX-ray14 (Data_Entry_2017.csv, "
    "images, train_val_list.txt and test_list.txt); lists:FOLDER,images=FOLDER with train*.txt and val*.txt or test*.txt of lines "
    "NAME 0 1 0; or a CSV file with the columns path and labels (separated by |, ; or a comma), or path "
    "and a column of 0 and 1 per label; csv:FILE,labels=A+B names the columns, csv:FILE,separator=NAME the separator "
    f"({', '.join(SEPARATORS)})"
)


@dataclass
class Rows:
    """Labels of a table: path and labels of each image, and the class names; `notes` say how they were read."""

    names: list[str]
    labels: list[Labels]
    classes: list[str]
    notes: list[str]


class Labelled:
    """Rendered images with several labels; both are computed on first access."""

    def __init__(self, images: Any, labels: Callable[[int], Labels]):
        self.images, self._labels = images, labels
        self._known: dict[int, Labels] = {}

    @property
    def targets(self) -> list[Labels]:
        """Return the labels of all images."""
        return [self._of(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Labels]:
        return self.images[index][0], self._of(index)

    def _of(self, index: int) -> Labels:
        if index not in self._known:
            self._known[index] = self._labels(self.images.numbers[index])
        return self._known[index]

    def describe(self, index: int) -> str:
        """Describe a sample as the underlying set does."""
        return self.images.describe(index)


def open_multilabel(
    spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None, split: str | None = None
) -> ImageData:
    """Open data with several labels per image; targets are float32 (classes,) of 1, 0 and NaN (unknown).

    Args:
        spec: "scenes" (which kinds of objects are visible) or "scenes:task=thorax" (rendered X-rays with four findings); a folder in the
            layout of NIH's ChestX-ray14; a CSV file, or a folder with a single one. Paths are relative to the CSV file's folder. Columns:
            path; either labels (separated by |, ; or a comma, which is recognised) or one column per label, of 1, 0, empty (0) and -1
            (unknown, as CheXpert's uncertain ones); optionally the part and the patient or group (see `Table`). "csv:FILE,labels=A+B" names
            the columns of labels: see `TableOptions`. NIH's files train_val_list.txt and test_list.txt define the parts, or lists of
            labels beside the table (see `label_lists`). "lists:FOLDER,images=FOLDER", or a folder of images with such lists, takes the
            labels from them, too.
        seed, val_fraction: of the held-out part if the data do not define one; no patient is in both parts.
        image_size: of rendered images, pixels.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: no such data, or files, columns or labels are missing; the message names the first ones.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "scenes":
        return chosen(
            _drawn(rest, seed=seed, val_fraction=0.2 if val_fraction == 1 else val_fraction, image_size=image_size), split, val_fraction
        )
    path, options = parse_options(rest) if kind == "csv" and colon else (Path(spec.removeprefix("folder:")), TableOptions())
    if kind == "lists" and colon:
        table, path = _of_lists(rest)
    elif path.is_dir() and not any(path.glob("*.csv")) and (lists := find_label_lists(path)):
        table, path = read_label_lists(lists, CHEST_FINDINGS), path / "lists"
    else:
        path = _table_of(spec, path)
        table = read_table(path)
    groups, by_group = table.groups(options)
    parts, by_part = _parts(table, options, split)
    rows = read_rows(table, options)
    files = _files(path, rows.names)

    def random_split(numbers: list[int]) -> tuple[list[int], list[int]]:
        owners = [groups[i] for i in numbers] if groups is not None else [str(i) for i in numbers]
        if len(set(owners)) < 2:
            whose = "groups" if groups is not None else "images"
            raise DataError(
                f"{path}: {len(set(owners))} {whose} cannot be divided with val_fraction={val_fraction}; at least two are needed"
            )
        return split_groups(numbers, owners, val_fraction, seed)

    found = divide(str(path), parts, random_split, val_fraction=val_fraction, split=split)
    if split is None:
        _check(path, rows, groups, found.train, found.val)
    sets = [FileImages([files[i] for i in part], [rows.labels[i] for i in part]) for part in (found.train, found.val)]  # type: ignore[misc]
    name = path.resolve().parent.name if path.stem.startswith("Data_Entry") or path.name == "lists" else path.stem
    notes = (*rows.notes, *by_part, *by_group, *table.unused(rows.classes), *found.notes)
    return ImageData(name, sets[0], sets[1], rows.classes, notes=notes, part=found.part, drawn=found.drawn)


def _table_of(spec: str, path: Path) -> Path:
    """Return the CSV file that a specification names, itself or by its folder."""
    if path.is_dir():
        tables = sorted(path.glob("Data_Entry_2017*.csv")) or sorted(path.glob("*.csv"))
        if len(tables) != 1:
            raise DataError(f"{path} holds {few([t.name for t in tables]) or 'no CSV file'}; one is needed\n{ACCEPTED}")
        return tables[0]
    if path.suffix.lower() != ".csv" or not path.is_file():
        siblings = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
        raise DataError(f"{spec!r} does not hold several labels per image{nearest(path.name, siblings)}\n{ACCEPTED}")
    return path


def _of_lists(text: str) -> tuple[Table, Path]:
    """Read "FOLDER,images=FOLDER" after "lists:": the table, and a path in the folder of the images."""
    place, _, images = text.partition(",images=")
    lists = find_label_lists(Path(place))
    if not lists:
        raise DataError(f"{place} holds no list of labels for training (train*.txt of lines NAME 0 1 0)\n{ACCEPTED}")
    return read_label_lists(lists, CHEST_FINDINGS), Path(images or place) / "lists"


def _drawn(options: str, *, seed: int, val_fraction: float, image_size: int | None) -> ImageData:
    from vitarium.data.scenes import THINGS, Scenes, open_scenes
    from vitarium.data.scenes.thorax import FINDINGS, thorax_findings

    data: Any = open_scenes(options, image_size=image_size, seed=seed, val_fraction=val_fraction)
    task = data.train.task
    if task == "thorax":
        classes, labels = list(FINDINGS), lambda number: thorax_findings(number, seed)
    elif task == "class":
        scenes = Scenes(data.image_size, seed)
        classes, labels = list(THINGS), lambda number: scenes[number].multi_label
    else:
        raise DataError(f"the images of the scenes' task {task!r} have one label each\n{ACCEPTED}")
    train, val = (Labelled(part, labels) for part in (data.train, data.val))
    return ImageData(data.name, train, val, classes, data.image_size)  # type: ignore[arg-type]  # targets are no numbers


def read_rows(table: Table, options: TableOptions) -> Rows:
    """Read paths and labels of a table.

    Raises:
        DataError: it lacks a required column.
    """
    place = table.place(options)
    if place is None:
        found = f"the columns {few(table.names)}" if table.names else "no lines"
        raise DataError(f"{table.path} has {found} and none with the path of an image (path)\n{ACCEPTED}")
    named = options.labels.split("+") if "+" in options.labels else []
    for name in named:
        table.find((), name)
    listed = None if named else table.find(LIST_COLUMNS, options.labels)
    if listed is not None and not (options.labels and set(table.column(listed)) <= VALUES.keys()):
        official = place.strip().lower() == "image index"
        classes, labels, note = _listed(table, listed, table.column(listed), options.separator, official=official)
    else:
        used = table.used | {place}
        own = named or ([listed] if listed else [name for name in table.names if name not in used and not _describes(name)])
        classes, labels = _of_columns(table.path, {name: table.column(name) for name in own}, certain=bool(named or listed))
        note = f"{table.path}: the labels are the columns {few(classes, 12)}; labels=A+B in csv:{table.path},labels=A+B names others"
    return Rows(table.column(place), labels, classes, [note])


def _describes(name: str) -> bool:
    """Return whether a column describes the image or its patient, by its name."""
    words = re.findall(r"[a-z]+", name.lower())
    return any(word in NOT_LABELS for word in words)


def _listed(table: Table, name: str, cells: list[str], separator: str, *, official: bool) -> tuple[list[str], list[Labels], str]:
    """Parse cells such as "Effusion|Mass" into classes, labels and a note. ChestX-ray14's classes are complete and in published order."""
    bare = [re.sub(r"^\[(.*)\]$", r"\1", cell) for cell in cells]  # Python's and JSON's lists
    quoted = bare != cells
    sign = SEPARATORS[separator] if separator else "," if quoted else "|" if official else separator_of(bare)
    lists = [[label.strip().strip("'\"" if quoted else "").strip() for label in (cell.split(sign) if sign else [cell])] for cell in bare]
    lists = [[label for label in labels if label not in NOTHING] for labels in lists]
    seen = {label for labels in lists for label in labels}
    classes = list(CHEST_FINDINGS) if official and seen <= set(CHEST_FINDINGS) else sorted(seen)
    said = f"separated by {sign!r}" if sign else "one label per image, as no separator was found"
    note = f"{table.path}: the column {name} holds {len(classes)} labels, {said}; separator=NAME in csv:{table.path},separator=NAME sets it"
    return classes, [np.array([name in labels for name in classes], np.float32) for labels in map(set, lists)], note


def separator_of(cells: Sequence[str]) -> str:
    """Return what separates several labels in a column: "|", ";", "," or " "; "" if there is only one label in each cell.

    Spaces separate only if that leaves at most half as many different labels, because names of labels may contain spaces.
    """
    for sign in ("|", ";", ","):
        if any(sign in cell for cell in cells):
            return sign
    words = {word for cell in cells for word in cell.split()}
    several = any(" " in cell for cell in cells)
    return " " if several and 2 * len(words) <= len({cell for cell in cells if cell}) else ""


def _of_columns(path: Path, cells: Mapping[str, list[str]], *, certain: bool) -> tuple[list[str], list[Labels]]:
    fits = {name: set(values) <= VALUES.keys() and any(values) for name, values in cells.items()}
    classes = [name for name, fit in fits.items() if fit]
    if not classes or (certain and not all(fits.values())):
        odd = [
            f"{name} (it holds {few(sorted(set(values) - VALUES.keys()), 2)})"
            for name, values in cells.items()
            if any(values) and not fits[name]
        ]
        why = f"none of the columns {few(odd, 3)} holds only 0 and 1" if odd else "the path is its only column"
        raise DataError(f"{path} has no labels: {why}\n{ACCEPTED}")
    table = np.array([[VALUES[value] for value in cells[name]] for name in classes], np.float32).T
    return classes, list(table)


def _files(path: Path, names: list[str]) -> list[str]:
    """Locate each image: relative to the table's folder, or (as NIH's archives are unpacked) anywhere below it by its name."""
    files = [str(path.parent / name) for name in names]
    if not all(os.path.isfile(file) for file in files):
        below = {os.path.basename(file): file for file in find_images(path.parent)}
        files = [file if os.path.isfile(file) else below.get(name, file) for file, name in zip(files, names, strict=True)]
    absent = [name for file, name in zip(files, names, strict=True) if not os.path.isfile(file)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    for bad, what, advice in (
        (absent, "images do not exist", "download them, or remove their rows"),
        (twice, "images are listed twice", "keep one row of each"),
    ):
        if bad:
            raise DataError(f"{path}: {len(bad)} of {len(names)} {what}: {few(bad)}; {advice}")
    return files


def _parts(table: Table, options: TableOptions, split: str | None) -> tuple[dict[str, list[int]], list[str]]:
    """Return row numbers by part: by lists beside the table, or by its columns; and notes."""
    lists = {part: table.path.parent / name for part, name in (("train", "train_val_list.txt"), ("test", "test_list.txt"))}
    if all(file.is_file() for file in lists.values()):
        place = table.place(options)
        numbers = {name: number for number, name in enumerate(table.column(place) if place else [])}
        named = {part: [numbers[name] for name in file.read_text().split() if name in numbers] for part, file in lists.items()}
        return named, [f"{table.path}: train_val_list.txt and test_list.txt give the parts"]
    listed = find_label_lists(table.path.parent)
    if table.path.suffix.lower() == ".csv" and listed:
        return _parts_by_lists(table, options, listed)
    parts, notes = table.parts(options)
    if split is None and "train" in parts and len(parts) == 1:
        raise DataError(f"{table.path}: the column split has train; it needs train and val")
    return parts, notes


def _parts_by_lists(table: Table, options: TableOptions, lists: dict[str, Path]) -> tuple[dict[str, list[int]], list[str]]:
    place = table.place(options)
    numbers = {name: number for number, name in enumerate(table.column(place) if place else [])}
    parts: dict[str, list[int]] = {}
    for row in read_label_lists(lists).rows:
        if (number := numbers.get(str(row["path"]))) is not None:
            parts.setdefault(str(row["split"]), []).append(number)
    return parts, [f"{table.path}: {few([file.name for file in lists.values()])} give the parts"]


def _check(path: Path, rows: Rows, groups: list[str] | None, train: Sequence[int], val: Sequence[int]) -> None:
    """Check the two parts.

    Raises:
        DataError: an empty part, no labels at all, or a patient in both parts.
    """
    for part, name in ((train, "training"), (val, "held-out")):
        if not part:
            raise DataError(f"{path}: the {name} part is empty; the lists or the column split name none of its {len(rows.names)} images")
    counts = np.nansum([rows.labels[i] for i in train], 0) if rows.classes else np.zeros(0)
    if not counts.any():
        raise DataError(f"{path}: no image of the training part has a label; there is nothing to learn\n{ACCEPTED}")
    if groups is not None and (both := sorted({groups[i] for i in train} & {groups[i] for i in val})):
        raise DataError(f"{path}: {len(both)} patients are in both parts, which would inflate any metric: {few(both)}; split by patient")
    if absent := [name for name, count in zip(rows.classes, counts, strict=True) if not count]:
        log.warning("%s: no training image has the label %s, so it cannot be learned", path, few(absent))
