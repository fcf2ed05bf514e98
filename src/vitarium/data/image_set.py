"""What training, evaluation and reports need to know of labelled images, wherever they come from."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ImageSet(Protocol):
    """Labelled images by index.

    `images[i]` gives (picture, class number), or (clip, class number) where the data is video; an unreadable one raises `BrokenImage`.
    `targets` gives all class numbers without opening a picture; `describe(i)` names a sample (a path, or a place in an archive).
    """

    targets: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def describe(self, index: int) -> str: ...


@dataclass(frozen=True)
class ImageData:
    """A classification data set with its held-out part.

    Attributes:
        name: for reports.
        train, val: the two parts; no picture is in both.
        classes: names, in the order of the class numbers.
        image_size: side of the pictures, pixels, where they have one in common.
    """

    name: str
    train: ImageSet
    val: ImageSet
    classes: list[str]
    image_size: int | None = None


class Subset:
    """Some samples of an image set, in a given order."""

    def __init__(self, images: ImageSet, indices: Sequence[int]):
        self.images, self.indices = images, list(indices)
        self.targets = [images.targets[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[self.indices[index]]

    def describe(self, index: int) -> str:
        """The name that the whole set gives the sample."""
        return self.images.describe(self.indices[index])


def stratified_split(targets: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of a training and a held-out part, each class in both by its share (at least one of each where it has two). Sorted.

    A pure function of its arguments.
    """
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, target in enumerate(targets):
        by_class[target].append(index)
    val: set[int] = set()
    for target in sorted(by_class):
        members = by_class[target]
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        val.update(random.Random(f"{seed} {target}").sample(members, count))
    return [i for i in range(len(targets)) if i not in val], sorted(val)
