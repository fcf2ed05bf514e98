"""Images with segments: the data set common to all sources, and functions that transform its targets."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vitarium.data.image_set import ImageData, View, stratified_split
from vitarium.data.joint import Segmentation
from vitarium.data.parts import Divided, divide
from vitarium.errors import DataError

Kind = Literal["panoptic", "semantic", "instance"]


@dataclass(frozen=True)
class SegmentedData(ImageData):
    """`ImageData` whose targets are `Segmentation`s.

    Attributes:
        things: numbers of the classes that have instances; the others are stuff.
    """

    things: tuple[int, ...] = ()


def merge_classes(target: Segmentation) -> Segmentation:
    """Merge the segments of each class into one, in the order of the classes."""
    labels = np.unique(target.labels)
    masks = np.array([target.masks[target.labels == label].any(0) for label in labels], bool).reshape(-1, *target.masks.shape[1:])
    return Segmentation(masks, labels)


def keep_classes(target: Segmentation, classes: Sequence[int]) -> Segmentation:
    """Keep only the segments of `classes`; the new label of a class is its position in that sequence."""
    kept = np.isin(target.labels, classes)
    numbers = {label: number for number, label in enumerate(classes)}
    labels = np.array([numbers[label] for label in target.labels[kept].tolist()], np.int64)
    return Segmentation(target.masks[kept], labels, target.crowds[kept])


def as_one_thing(target: Segmentation, things: int) -> Segmentation:
    """Give all things the class 0, and stuff the classes from 1 on.

    Args:
        things: number of classes of things, which are numbered before those of stuff.
    """
    return replace(target, labels=np.maximum(target.labels - things + 1, 0))


def one_kind_of_thing(data: SegmentedData) -> SegmentedData:
    """Return the data with all things in one class, "thing", before those of stuff: whether things are found, not which.

    Raises:
        DataError: the data has no things, or their classes are not numbered before those of stuff.
    """
    count = len(data.things)
    if not count or data.things != tuple(range(count)):
        raise DataError(f"{data.name} has no things that are numbered before its stuff")
    merged = functools.partial(View, transform_target=functools.partial(as_one_thing, things=count))
    return replace(data, train=merged(data.train), val=merged(data.val), classes=["thing", *data.classes[count:]], things=(0,))


def split_samples(samples: list[Any], val_fraction: float, seed: int, name: str) -> tuple[list[Any], list[Any]]:
    """Split samples at random into a training and a held-out part.

    Raises:
        DataError: fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(f"{name} holds {len(samples) or 'no'} images with segments; at least two are needed, one of them for validation")
    train, val = stratified_split([0] * len(samples), val_fraction, seed)
    return [samples[i] for i in train], [samples[i] for i in val]


def divide_samples(name: str, parts: Mapping[str, list[Any]], *, seed: int, val_fraction: float, split: str | None) -> Divided:
    """Choose the samples for training and for evaluation, neither of which is empty: see `divide`.

    Raises:
        DataError: a part is missing or empty.
    """
    random_split = lambda samples: split_samples(samples, val_fraction, seed, name)
    found = divide(name, parts, random_split, val_fraction=val_fraction, split=split)
    if not found.val or (split is None and not found.train):
        raise DataError(f"{name} holds {len(found.train)} images for training and {len(found.val)} held out; both must not be empty")
    return found
