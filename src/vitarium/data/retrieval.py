"""Data for image retrieval: the training part and the searched part have no common classes."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from vitarium.data.folders import FileImages, list_parts
from vitarium.data.image_set import ImageData, ImageSet, Joined, View
from vitarium.data.opening import EMBEDDED, open_classes
from vitarium.data.parts import find_parts, natural_order
from vitarium.data.scan import subfolders
from vitarium.errors import DataError

IMAGES_A_GROUP = 4
"""Number of images of a class that are adjacent in a batch."""


class Groups:
    """Image set whose samples are lists of `size` images of one class, drawn from Python's generator (which the loader seeds).

    The number of groups of a class is its number of images divided by the size; in a class with fewer images than a group some are
    repeated.

    Args:
        images: single images.
        size: images per group.
    """

    def __init__(self, images: ImageSet, size: int = IMAGES_A_GROUP):
        self.images, self.size = images, size
        self.members: dict[int, list[int]] = defaultdict(list)
        for index, target in enumerate(images.targets):
            self.members[target].append(index)
        self.targets = [target for target in sorted(self.members) for _ in range(-(-len(self.members[target]) // size))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[list[Any], int]:
        members = self.members[self.targets[index]]
        chosen = random.sample(members, min(self.size, len(members)))
        chosen += random.choices(members, k=self.size - len(chosen))
        return [self.images[i][0] for i in chosen], self.targets[index]

    def describe(self, index: int) -> str:
        """Describe a group by one of its images."""
        return f"{self.size} images such as {self.images.describe(self.members[self.targets[index]][0])}"


def _renumbered(images: ImageSet, numbers: dict[int, int]) -> View:
    """Return the samples whose class is in `numbers`, relabelled with the class number that it maps to."""
    indices = [i for i, target in enumerate(images.targets) if target in numbers]
    return View(images, indices, targets=[numbers[images.targets[i]] for i in indices])


def open_retrieval(
    spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None, split: str | None = None
) -> ImageData:
    """Open images in classes: groups of four from the first half of the classes for training, single images of the second half for search.

    This is the split of CUB-200, Cars-196 and similar data sets, whose class folders can be opened as they are. Folders train/ and val/ (or
    test/) without common classes (Stanford Online Products) are used as the two parts.

    Args:
        spec: anything that `open_data` accepts for classes.
        seed: of rendered data.
        val_fraction: ignored: the split is by classes, in the order of their names.
        image_size: of rendered or cropped images.
        split: for an evaluation, the part that it measures: "all" are all classes, "val" and "train" the halves; see `divide`.

    Returns:
        data whose `classes` are those of the training part.

    Raises:
        DataError: fewer than four classes, or a part of a folder that cannot be used.
    """
    apart = _folders_apart(spec, split)
    if apart is not None:
        return apart
    if split in ("auto", "all", "test") and spec.partition(":")[0] not in EMBEDDED:
        data = open_classes(spec, seed=seed, val_fraction=0.2, image_size=image_size, split=split)
        return ImageData(data.name, Groups(data.train), data.val, data.classes, data.image_size, data.notes, data.part)  # type: ignore[arg-type]
    data = open_classes(spec, seed=seed, val_fraction=0.2, image_size=image_size, split=None)
    half = len(data.classes) // 2
    if half < 2:
        raise DataError(
            f"{data.name} has {len(data.classes)} classes; retrieval needs at least four: half of them are searched, and training needs "
            "at least two"
        )
    both = Joined([data.train, data.val])
    train = _renumbered(both, {i: i for i in range(half)})
    val = _renumbered(both, {i: i - half for i in range(half, len(data.classes))})
    searched, part = {"all": (both, "all"), "train": (train, "train")}.get(split or "", (val, "val"))
    return ImageData(data.name, Groups(train), searched, data.classes[:half], data.image_size, data.notes, part)  # type: ignore[arg-type]


def _folders_apart(spec: str, split: str | None) -> ImageData | None:
    """Return the parts of a folder with train/ and val/ without common classes; None for anything else."""
    path = Path(spec.removeprefix("folder:"))
    if spec in EMBEDDED or not path.is_dir() or split in ("all", "train"):
        return None
    if len(find_parts(subfolders(path))) < 2 or any(path.glob("*/*.tar")):
        return None
    listings, notes = list_parts(path)
    held_out = next((part for part in ((split,) if split == "test" else ("val", "test")) if part in listings), None)
    if "train" not in listings or held_out is None or set(listings["train"].labels) & set(listings[held_out].labels):
        return None
    sets = []
    for part in ("train", held_out):
        classes = sorted(set(listings[part].labels), key=natural_order)
        numbers = {label: number for number, label in enumerate(classes)}
        sets.append((FileImages(listings[part].samples, [numbers[label] for label in listings[part].labels]), classes))
    if len(sets[0][1]) < 2:
        raise DataError(f"{path}: the training part has only one class; training needs at least two")
    return ImageData(path.resolve().name, Groups(sets[0][0]), sets[1][0], sets[0][1], notes=notes, part=held_out)  # type: ignore[arg-type]
