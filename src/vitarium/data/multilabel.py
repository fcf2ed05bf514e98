"""Pictures with several labels each, every one a yes or a no: drawn, in a CSV file, or in the layout of NIH's ChestX-ray14."""

from __future__ import annotations

import csv
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data.folders import PATH_COLUMNS, FileImages, find_images
from vitarium.data.image_set import ImageData
from vitarium.data.parts import few, part_names
from vitarium.errors import DataError, nearest

if TYPE_CHECKING:
    from PIL import Image

Labels = NDArray[np.float32]
"""(classes,): 1 yes, 0 no, NaN not known."""

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
"""Of ChestX-ray14, in the order in which its models are published."""
NOTHING = ("No Finding", "No finding", "none", "")
"""What a list of labels says where there are none."""
LIST_COLUMNS = ("labels", "finding labels", "findings")
PATIENT_COLUMNS = ("patient", "patient id", "patient_id", "subject_id")
VALUES = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "-1": np.nan, "-1.0": np.nan}
"""What a label's own column may hold; -1 is CheXpert's "uncertain"."""
ACCEPTED = (
    "accepted for several labels a picture: scenes[:task=thorax]; a folder in the layout of NIH's ChestX-ray14 (Data_Entry_2017.csv, "
    "images, train_val_list.txt and test_list.txt); or a CSV file with the columns path and labels (separated by |), or path and a column "
    "of 0 and 1 for each label"
)


@dataclass
class Rows:
    """The lines of a table: where each picture lies, what it shows, and (None where that is not said) whose it is and for which part."""

    names: list[str]
    labels: list[Labels]
    classes: list[str]
    patients: list[str] | None
    parts: list[str] | None


class Labelled:
    """Drawn pictures with several labels, which are looked up or drawn when they are first asked for."""

    def __init__(self, images: Any, labels: Callable[[int], Labels]):
        self.images, self._labels = images, labels
        self._known: dict[int, Labels] = {}

    @property
    def targets(self) -> list[Labels]:
        """The labels of all."""
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
        """As the set does."""
        return self.images.describe(index)


def open_multilabel(spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None) -> ImageData:
    """Open data with several labels a picture; targets are float32 (classes,) of 1, 0 and NaN (not known).

    Args:
        spec: "scenes" (which kinds of things are seen) or "scenes:task=thorax" (drawn X-rays with four findings); a folder in the layout
            of NIH's ChestX-ray14; a CSV file, or a folder with a single one. Paths in it count from its own folder. Its columns: path;
            either labels (separated by |) or one a label, of 1, 0, empty (0) and -1 (not known, as CheXpert's uncertain ones); and where
            there are such, patient and split (train, val). NIH's own files train_val_list.txt and test_list.txt say the parts.
        seed, val_fraction: of the part that is held out where the data do not say; no patient is in both.
        image_size: of pictures that are drawn, pixels.

    Raises:
        DataError: nothing of the kind there, or files, columns or labels are missing; the message names the first ones.
    """
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        return _drawn(rest, seed=seed, val_fraction=val_fraction, image_size=image_size)
    path = Path(spec.removeprefix("csv:").removeprefix("folder:"))
    if path.is_dir():
        tables = sorted(path.glob("Data_Entry_2017*.csv")) or sorted(path.glob("*.csv"))
        if len(tables) != 1:
            raise DataError(f"{path} holds {few([t.name for t in tables]) or 'no CSV file'}; one is needed\n{ACCEPTED}")
        path = tables[0]
    elif path.suffix.lower() != ".csv" or not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{spec!r} has no several labels a picture{nearest(path.name, siblings)}\n{ACCEPTED}")
    rows = read_rows(path)
    files = _files(path, rows.names)
    train, val = _parts(path, rows, seed, val_fraction)
    _check(path, rows, train, val)
    sets = [FileImages([files[i] for i in part], [rows.labels[i] for i in part]) for part in (train, val)]  # type: ignore[misc]
    name = path.resolve().parent.name if path.stem.startswith("Data_Entry") else path.stem
    return ImageData(name, sets[0], sets[1], rows.classes)


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
        raise DataError(f"the pictures of the scenes' task {task!r} have one label each\n{ACCEPTED}")
    train, val = (Labelled(part, labels) for part in (data.train, data.val))
    return ImageData(data.name, train, val, classes, data.image_size)  # type: ignore[arg-type]  # targets are no numbers


def read_rows(path: Path) -> Rows:
    """The lines of a CSV file.

    Raises:
        DataError: it cannot be read, or lacks a column that is needed.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; it should be a CSV file in UTF-8") from error
    columns = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    find = lambda names: next((columns[name] for name in names if name in columns), None)
    place, listed = find(("image index", *PATH_COLUMNS)), find(LIST_COLUMNS)
    patient, split = find(PATIENT_COLUMNS), find(("split",))
    if place is None:
        found = f"the columns {few(list(columns.values()))}" if columns else "no lines"
        raise DataError(f"{path} has {found} and none that says where a picture is (path)\n{ACCEPTED}")
    column = lambda name: [(row[name] or "").strip() for row in rows]
    if listed is not None:
        classes, labels = _listed(column(listed), official=place.strip().lower() == "image index")
    else:
        own = [name for name in columns.values() if name not in (place, patient, split)]
        classes, labels = _of_columns(path, {name: column(name) for name in own})
    return Rows(column(place), labels, classes, column(patient) if patient else None, column(split) if split else None)


def _listed(cells: list[str], *, official: bool) -> tuple[list[str], list[Labels]]:
    """Cells such as "Effusion|Mass" -> classes and labels; ChestX-ray14's classes have their published order, seen or not."""
    lists = [[label.strip() for label in cell.split("|") if label.strip() not in NOTHING] for cell in cells]
    seen = {label for labels in lists for label in labels}
    classes = list(CHEST_FINDINGS) if official and seen <= set(CHEST_FINDINGS) else sorted(seen)
    return classes, [np.array([name in labels for name in classes], np.float32) for labels in map(set, lists)]


def _of_columns(path: Path, cells: dict[str, list[str]]) -> tuple[list[str], list[Labels]]:
    classes = [name for name, values in cells.items() if set(values) <= VALUES.keys() and any(values)]
    if not classes:
        odd = [f"{name} (it holds {few(sorted(set(values) - VALUES.keys()), 2)})" for name, values in cells.items() if any(values)]
        why = f"none of the columns {few(odd, 3)} holds 0 and 1 alone" if odd else "there is no other column than the path"
        raise DataError(f"{path} has no labels: {why}\n{ACCEPTED}")
    table = np.array([[VALUES[value] for value in cells[name]] for name in classes], np.float32).T
    return classes, list(table)


def _files(path: Path, names: list[str]) -> list[str]:
    """Where each picture lies: from the table's folder, or (as NIH's archives are unpacked) anywhere below it by its name."""
    files = [str(path.parent / name) for name in names]
    if not all(os.path.isfile(file) for file in files):
        below = {os.path.basename(file): file for file in find_images(path.parent)}
        files = [file if os.path.isfile(file) else below.get(name, file) for file, name in zip(files, names, strict=True)]
    absent = [name for file, name in zip(files, names, strict=True) if not os.path.isfile(file)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    for bad, what, advice in (
        (absent, "pictures are not there", "fetch them, or take their lines out"),
        (twice, "pictures are listed twice", "keep one line of each"),
    ):
        if bad:
            raise DataError(f"{path}: {len(bad)} of {len(names)} {what}: {few(bad)}; {advice}")
    return files


def _parts(path: Path, rows: Rows, seed: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Line numbers of the training and the held-out part: by lists beside the table, by its column split, or by chance."""
    lists = [path.parent / name for name in ("train_val_list.txt", "test_list.txt")]
    if all(file.is_file() for file in lists):
        numbers = {name: number for number, name in enumerate(rows.names)}
        parts = [[numbers[name] for name in file.read_text().split() if name in numbers] for file in lists]
    elif rows.parts is not None:
        train, val = part_names(rows.parts)
        if train is None or val is None:
            raise DataError(f"{path}: the column split has {few(sorted(set(rows.parts)))}; it needs train and val")
        parts = [[i for i, part in enumerate(rows.parts) if part == name] for name in (train, val)]
    else:
        groups = rows.patients or [str(i) for i in range(len(rows.names))]
        everyone = sorted(set(groups))
        if not 0 < val_fraction < 1 or len(everyone) < 2:
            whose = "patients" if rows.patients else "pictures"
            raise DataError(f"{path}: {len(everyone)} {whose} cannot be divided with val_fraction={val_fraction}; two or more are needed")
        count = min(max(1, round(val_fraction * len(everyone))), len(everyone) - 1)
        held_out = set(random.Random(f"{seed} multilabel").sample(everyone, count))
        parts = [[i for i, group in enumerate(groups) if (group in held_out) is wanted] for wanted in (False, True)]
    return parts[0], parts[1]


def _check(path: Path, rows: Rows, train: Sequence[int], val: Sequence[int]) -> None:
    """
    Raises:
        DataError: an empty part, no labels at all, or a patient in both parts.
    """
    for part, name in ((train, "training"), (val, "held-out")):
        if not part:
            raise DataError(f"{path}: the {name} part is empty; the lists or the column split name none of its {len(rows.names)} pictures")
    counts = np.nansum([rows.labels[i] for i in train], 0) if rows.classes else np.zeros(0)
    if not counts.any():
        raise DataError(f"{path}: no picture of the training part has a label; there is nothing to learn\n{ACCEPTED}")
    if rows.patients and (both := sorted({rows.patients[i] for i in train} & {rows.patients[i] for i in val})):
        raise DataError(f"{path}: {len(both)} patients are in both parts, which would flatter any model: {few(both)}; divide by patient")
    if absent := [name for name, count in zip(rows.classes, counts, strict=True) if not count]:
        log.warning("%s: no training picture shows %s; that cannot be learned", path, few(absent))
