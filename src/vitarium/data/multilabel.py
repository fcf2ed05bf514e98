"""Images with several binary labels each: rendered, from a CSV file, or in the layout of NIH's ChestX-ray14."""

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
LIST_COLUMNS = ("labels", "finding labels", "findings")
PATIENT_COLUMNS = ("patient", "patient id", "patient_id", "subject_id")
VALUES = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "-1": np.nan, "-1.0": np.nan}
"""Accepted entries in a column of one label; -1 is CheXpert's "uncertain"."""
ACCEPTED = (
    "accepted for several labels per image: scenes[:task=thorax]; a folder in the layout of NIH's ChestX-ray14 (Data_Entry_2017.csv, "
    "images, train_val_list.txt and test_list.txt); or a CSV file with the columns path and labels (separated by |), or path and a column "
    "of 0 and 1 per label"
)


@dataclass
class Rows:
    """Rows of a table: path and labels of each image, and its patient and part (None if the table does not contain them)."""

    names: list[str]
    labels: list[Labels]
    classes: list[str]
    patients: list[str] | None
    parts: list[str] | None


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


def open_multilabel(spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None) -> ImageData:
    """Open data with several labels per image; targets are float32 (classes,) of 1, 0 and NaN (unknown).

    Args:
        spec: "scenes" (which kinds of objects are visible) or "scenes:task=thorax" (rendered X-rays with four findings); a folder in the
            layout of NIH's ChestX-ray14; a CSV file, or a folder with a single one. Paths are relative to the CSV file's folder. Columns:
            path; either labels (separated by |) or one column per label, of 1, 0, empty (0) and -1 (unknown, as CheXpert's uncertain
            ones); optionally patient and split (train, val). NIH's files train_val_list.txt and test_list.txt define the parts.
        seed, val_fraction: of the held-out part if the data do not define one; no patient is in both parts.
        image_size: of rendered images, pixels.

    Raises:
        DataError: no such data, or files, columns or labels are missing; the message names the first ones.
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
        raise DataError(f"{spec!r} does not hold several labels per image{nearest(path.name, siblings)}\n{ACCEPTED}")
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
        raise DataError(f"the images of the scenes' task {task!r} have one label each\n{ACCEPTED}")
    train, val = (Labelled(part, labels) for part in (data.train, data.val))
    return ImageData(data.name, train, val, classes, data.image_size)  # type: ignore[arg-type]  # targets are no numbers


def read_rows(path: Path) -> Rows:
    """Read the rows of a CSV file.

    Raises:
        DataError: it cannot be read, or lacks a required column.
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
        raise DataError(f"{path} has {found} and none with the path of an image (path)\n{ACCEPTED}")
    column = lambda name: [(row[name] or "").strip() for row in rows]
    if listed is not None:
        classes, labels = _listed(column(listed), official=place.strip().lower() == "image index")
    else:
        own = [name for name in columns.values() if name not in (place, patient, split)]
        classes, labels = _of_columns(path, {name: column(name) for name in own})
    return Rows(column(place), labels, classes, column(patient) if patient else None, column(split) if split else None)


def _listed(cells: list[str], *, official: bool) -> tuple[list[str], list[Labels]]:
    """Parse cells such as "Effusion|Mass" into classes and labels; ChestX-ray14's classes are complete and in their published order."""
    lists = [[label.strip() for label in cell.split("|") if label.strip() not in NOTHING] for cell in cells]
    seen = {label for labels in lists for label in labels}
    classes = list(CHEST_FINDINGS) if official and seen <= set(CHEST_FINDINGS) else sorted(seen)
    return classes, [np.array([name in labels for name in classes], np.float32) for labels in map(set, lists)]


def _of_columns(path: Path, cells: dict[str, list[str]]) -> tuple[list[str], list[Labels]]:
    classes = [name for name, values in cells.items() if set(values) <= VALUES.keys() and any(values)]
    if not classes:
        odd = [f"{name} (it holds {few(sorted(set(values) - VALUES.keys()), 2)})" for name, values in cells.items() if any(values)]
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


def _parts(path: Path, rows: Rows, seed: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Return the row numbers of the training and the held-out part: by lists beside the table, by its column split, or at random."""
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
            whose = "patients" if rows.patients else "images"
            raise DataError(f"{path}: {len(everyone)} {whose} cannot be divided with val_fraction={val_fraction}; at least two are needed")
        count = min(max(1, round(val_fraction * len(everyone))), len(everyone) - 1)
        held_out = set(random.Random(f"{seed} multilabel").sample(everyone, count))
        parts = [[i for i, group in enumerate(groups) if (group in held_out) is wanted] for wanted in (False, True)]
    return parts[0], parts[1]


def _check(path: Path, rows: Rows, train: Sequence[int], val: Sequence[int]) -> None:
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
    if rows.patients and (both := sorted({rows.patients[i] for i in train} & {rows.patients[i] for i in val})):
        raise DataError(f"{path}: {len(both)} patients are in both parts, which would inflate any metric: {few(both)}; split by patient")
    if absent := [name for name, count in zip(rows.classes, counts, strict=True) if not count]:
        log.warning("%s: no training image has the label %s, so it cannot be learned", path, few(absent))
