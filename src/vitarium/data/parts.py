"""Training and held-out parts with numbered classes, made from labelled samples. Data that cannot be trained on raise DataError."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from vitarium.data.image_set import ImageData, ImageSet, stratified_split
from vitarium.errors import DataError, nearest

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "dev", "eval", "test", "testing")
"""Accepted names of the held-out part; the first one found is used."""


class Listing(NamedTuple):
    """Unopened samples: a locator (such as a path) and a class name each."""

    samples: list[Any]
    labels: list[str]


def part_names(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the training and of the held-out part, in any case; None for a missing part."""
    by_lower = {name.lower(): name for name in names}

    def first(accepted: Sequence[str]) -> str | None:
        return next((by_lower[name] for name in accepted if name in by_lower), None)

    return first(TRAIN_NAMES), first(VAL_NAMES)


def assemble(
    name: str,
    make: Callable[[list[Any], list[int]], ImageSet],
    train: Listing,
    val: Listing | None = None,
    *,
    classes: list[str] | None = None,
    seed: int,
    val_fraction: float,
) -> ImageData:
    """Number the classes, hold out a part if none is given, and check both.

    Args:
        name: of the data, for messages and reports.
        make: (samples, class numbers) -> image set.
        train: all samples, if there is no `val`.
        val: the held-out part, if the data have one.
        classes: class names in order; None: the training part's, sorted (numbers by value).
        seed, val_fraction: of the split, if there is no `val`.

    Raises:
        DataError: fewer than two classes; a class without images in either part; a held-out class that is not in the training part.
    """
    if not train.samples:
        raise DataError(f"{name} holds no training images")
    classes = classes or sorted(set(train.labels), key=natural_order)
    if len(classes) < 2:
        raise DataError(f"{name} has only one class, {classes[0]!r}; a classifier needs at least two")
    numbers = {label: number for number, label in enumerate(classes)}
    _check_labels(name, "training", train, numbers)
    if val is None:
        val, train = _split(name, train, val_fraction, seed)
    else:
        if not val.samples:
            raise DataError(f"{name} holds no images in its held-out part; add some, or remove it to hold out a part of the training set")
        _check_labels(name, "held-out", val, numbers)
    _check_all_present(name, "training", train, classes)
    _check_all_present(name, "held-out", val, classes)
    sets = [make(part.samples, [numbers[label] for label in part.labels]) for part in (train, val)]
    return ImageData(name, sets[0], sets[1], classes)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which "class 10" comes after "class 9"."""
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]


def few(names: Sequence[Any], count: int = 5) -> str:
    """Return a short list for messages: 'a, b, c and 7 more'."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(str, names[:count])) + more


def _check_labels(name: str, part: str, listing: Listing, numbers: dict[str, int]) -> None:
    if unknown := sorted(set(listing.labels) - numbers.keys(), key=natural_order):
        hint = nearest(unknown[0], numbers)
        raise DataError(f"{name}: the {part} part has unknown classes: {few(unknown)}{hint} (known: {few(list(numbers))})")


def _check_all_present(name: str, part: str, listing: Listing, classes: list[str]) -> None:
    present = set(listing.labels)
    if absent := [label for label in classes if label not in present]:
        what = f"{len(absent)} of {len(classes)} classes have no {part} images: {few(absent)}"
        raise DataError(f"{name}: {what}; add images to them or remove them")


def _split(name: str, listing: Listing, val_fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Split samples by class at random: (held-out, training)."""
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    counts = Counter(listing.labels)
    if alone := sorted((label for label, count in counts.items() if count == 1), key=natural_order):
        raise DataError(f"{name}: a class with one image cannot be split; add images to these classes: {few(alone)}")
    order = {label: number for number, label in enumerate(sorted(counts, key=natural_order))}
    train, val = stratified_split([order[label] for label in listing.labels], val_fraction, seed)
    pick = lambda indices: Listing([listing.samples[i] for i in indices], [listing.labels[i] for i in indices])
    return pick(val), pick(train)
