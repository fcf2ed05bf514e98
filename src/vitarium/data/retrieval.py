"""Data for image retrieval: the training part and the searched part have no common classes."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from vitarium.data.folders import FileImages, list_classes
from vitarium.data.image_set import ImageData, ImageSet, Joined, View
from vitarium.data.opening import open_data
from vitarium.data.parts import natural_order, part_names
from vitarium.errors import DataError

PICTURES_A_GROUP = 4
"""Number of images of a class that are adjacent in a batch."""


class Groups:
    """Image set whose samples are lists of `size` images of one class, drawn from Python's generator (which the loader seeds).

    The number of groups of a class is its number of images divided by the size; in a class with fewer images than a group some are
    repeated.

    Args:
        images: single images.
        size: images per group.
    """

    def __init__(self, images: ImageSet, size: int = PICTURES_A_GROUP):
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


def open_retrieval(spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None) -> ImageData:
    """Open images in classes: groups of four from the first half of the classes for training, single images of the second half for search.

    This is the split of CUB-200, Cars-196 and similar data sets, whose class folders can be opened as they are. Folders train/ and val/ (or
    test/) without common classes (Stanford Online Products) are used as the two parts.

    Args:
        spec: anything that `open_data` accepts for classes.
        seed: of rendered data.
        val_fraction: ignored: the split is by classes, in the order of their names.
        image_size: of rendered or cropped images.

    Returns:
        data whose `classes` are those of the training part.

    Raises:
        DataError: fewer than four classes, or a part of a folder that cannot be used.
    """
    apart = _folders_apart(spec)
    if apart is not None:
        return apart
    data = open_data(spec, seed=seed, image_size=image_size)
    half = len(data.classes) // 2
    if half < 2:
        raise DataError(
            f"{data.name} has {len(data.classes)} classes; retrieval needs at least four: half of them are searched, and training needs "
            "at least two"
        )
    both = Joined([data.train, data.val])
    train = _renumbered(both, {i: i for i in range(half)})
    val = _renumbered(both, {i: i - half for i in range(half, len(data.classes))})
    return ImageData(data.name, Groups(train), val, data.classes[:half], data.image_size)  # type: ignore[arg-type]


def _folders_apart(spec: str) -> ImageData | None:
    """Return the parts of a folder with train/ and val/ without common classes; None for anything else."""
    path = Path(spec.removeprefix("folder:"))
    if not path.is_dir():
        return None
    train, val = part_names(entry.name for entry in path.iterdir() if entry.is_dir())
    if train is None or val is None:
        return None
    learned, searched = list_classes(path / train), list_classes(path / val)
    if set(learned.labels) & set(searched.labels):
        return None
    sets = []
    for listing in (learned, searched):
        classes = sorted(set(listing.labels), key=natural_order)
        numbers = {label: number for number, label in enumerate(classes)}
        sets.append((FileImages(listing.samples, [numbers[label] for label in listing.labels]), classes))
    if len(sets[0][1]) < 2:
        raise DataError(f"{path / train} has only one class; training needs at least two")
    return ImageData(path.resolve().name, Groups(sets[0][0]), sets[1][0], sets[0][1])  # type: ignore[arg-type]
