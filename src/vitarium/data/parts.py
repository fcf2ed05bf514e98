"""Training and held-out parts with numbered classes, made from labelled samples. Data that cannot be used raise DataError."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from vitarium.data.image_set import ImageData, ImageSet, Joined, stratified_split
from vitarium.errors import DataError, UsageError, nearest

PART_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Names of the parts of all kinds of data, for all tasks; the first one found is used."""

FILLERS = frozenset(["set", "data", "dataset", "split", "part", "images", "image", "imgs", "img", "photos", "seg"])
"""Words that a part's name may have beside: test_set, seg_train, train_images."""

SPLITS = ("auto", "all", "train", "val", "test")
"""Parts that an evaluation may ask for. "auto": the held-out part if there is one, else everything."""

_PART_OF_WORD = {word: part for part, words in PART_WORDS.items() for word in words}
_RANK = {word: rank for words in PART_WORDS.values() for rank, word in enumerate(words)}
_JOINED = re.compile(rf"({'|'.join(sorted(_PART_OF_WORD, key=len, reverse=True))})({'|'.join(sorted(FILLERS))})")
T = TypeVar("T")


class Listing(NamedTuple):
    """Unopened samples: a locator (such as a path) and a class name each."""

    samples: list[Any]
    labels: list[str]


class Divided(NamedTuple):
    """Samples of the two parts, the name of the one that is evaluated ("val", "test", "train" or "all"), notes for the user, and whether a
    training drew the evaluated one at random."""

    train: list[Any]
    val: list[Any]
    part: str
    notes: tuple[str, ...]
    drawn: bool = False


def part_of(name: str) -> str | None:
    """Return "train", "val" or "test" for the name of a part, such as Train, valid, test_set, seg_train or train2017; else None."""
    words = [word for word in _words(name) if word not in FILLERS]
    return _PART_OF_WORD.get(words[0]) if len(words) == 1 else None


def part_in(name: str) -> str | None:
    """Return the part that the first fitting word of a longer name names: "train" for imagenet-train-0001.tar; else None."""
    return next((_PART_OF_WORD[word] for word in _words(name) if word in _PART_OF_WORD), None)


def find_parts(names: Iterable[str]) -> dict[str, str]:
    """Return part ("train", "val", "test") -> the name that stands for it. Of several names of a part the most usual one is used."""
    ranked: dict[str, tuple[tuple[int, int, str], str]] = {}
    for name in names:
        if (part := part_of(name)) is None:
            continue
        rank = min(_RANK[word] for word in _words(name) if word in _RANK)
        key = (rank, len(name), name)
        if part not in ranked or key < ranked[part][0]:
            ranked[part] = key, name
    return {part: ranked[part][1] for part in PART_WORDS if part in ranked}


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, without numbers; "trainset" and "testdata" are two words each."""
    return re.findall(r"[a-z]+", _JOINED.sub(r"\1 \2", name.lower()))


def divide(
    name: str,
    parts: Mapping[str, Sequence[T]],
    random_split: Callable[[list[T]], tuple[list[T], list[T]]],
    *,
    val_fraction: float = 0.2,
    split: str | None = None,
) -> Divided:
    """Choose the samples for training and for evaluation.

    Args:
        name: of the data, for messages.
        parts: samples by part, "train", "val" and "test"; or under "" those of data without parts.
        random_split: samples -> (training, held-out), for data without a held-out part.
        val_fraction: share that `random_split` holds out; 1 holds out everything, in an evaluation.
        split: None for training: both parts are needed. For an evaluation one of `SPLITS`: `val` holds each sample of that part, and
            `train` those of the training part, if there is one.

    Raises:
        DataError: a part that is needed is missing, or a share that cannot be held out.
        UsageError: `split` is no part's name.
    """
    if split is None:
        return _for_training(name, parts, random_split, val_fraction)
    if split not in SPLITS:
        raise UsageError(f"there is no part {split!r}{nearest(split, SPLITS)} (accepted: {', '.join(SPLITS)})")
    if not 0 < val_fraction <= 1:
        raise DataError(f"val_fraction must lie above 0 and not above 1, got {val_fraction}")
    undivided, train = parts.get(""), list(parts.get("train", ()))
    held_out = next((part for part in ("val", "test") if part in parts), None)
    everything = [sample for samples in parts.values() for sample in samples]
    if split == "all" or (split == "auto" and held_out is None) or (split == "val" and undivided is not None and val_fraction == 1):
        return Divided(train, everything, "all", ())
    asked = split
    if split == "auto" or (split == "val" and "val" not in parts and held_out is not None):
        split = str(held_out)
    if split in parts:
        return Divided(train, list(parts[split]), split, _others(parts, {split, "train"}) if asked == "auto" else ())
    whole = undivided if undivided is not None else parts.get("train")
    if split == "test" or whole is None:
        has = f"it has {', '.join(part for part in parts if part)}" if undivided is None else "it has no parts"
        raise DataError(f"{name} has no part {split}; {has}. Choose with --split ({', '.join(SPLITS)}); all measures every image")
    kept, held = random_split(list(whole))
    return Divided(kept, kept if split == "train" else held, split, ())


def _for_training(name: str, parts: Mapping[str, Sequence[T]], random_split: Callable[..., Any], val_fraction: float) -> Divided:
    whole = parts.get("train", parts.get(""))
    if whole is None:
        there = ", ".join(parts)
        raise DataError(f"{name} holds {there} but no train; training needs a part train (vitarium evaluate measures {there} alone)")
    held_out = next((part for part in ("val", "test") if part in parts), None)
    if held_out is not None:
        return Divided(list(whole), list(parts[held_out]), held_out, _others(parts, {"train", held_out}))
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    kept, held = random_split(list(whole))
    return Divided(kept, held, "val", (), drawn=True)


def _others(parts: Mapping[str, Sequence[Any]], used: set[str]) -> tuple[str, ...]:
    return tuple(
        f"the part {part} ({len(samples)} images) is not used here; vitarium evaluate --split {part} measures it"
        for part, samples in parts.items()
        if part not in used
    )


def chosen(data: ImageData, split: str | None, val_fraction: float = 0.2) -> ImageData:
    """Return data with two parts, as `divide` does: for an evaluation of `split`, `val` holds that part."""
    if split is None:
        return data
    if split == "all" or (split == "val" and val_fraction == 1):
        return replace(data, val=Joined([data.train, data.val]), part="all")
    parts = {"train": [data.train], data.part: [data.val]}
    found = divide(data.name, parts, lambda samples: (samples, samples), split=split)
    return replace(data, val=found.val[0], part=found.part)


def assemble(
    name: str,
    make: Callable[[list[Any], list[int]], ImageSet],
    parts: Mapping[str, Listing],
    *,
    classes: list[str] | None = None,
    seed: int,
    val_fraction: float,
    split: str | None = None,
    groups: Mapping[Any, str] | None = None,
    notes: Sequence[str] = (),
) -> ImageData:
    """Number the classes, hold out a part if none is given, and check both.

    Args:
        name: of the data, for messages and reports.
        make: (samples, class numbers) -> image set.
        parts: samples by part, "train", "val" and "test"; or under "" all of them.
        classes: class names in order, of which those without any image are left out; None: the names that occur, sorted (numbers by
            value), in training data those of the training part.
        seed, val_fraction: of the split, if no part is held out.
        split: None for training; see `divide`.
        groups: group of a sample, such as a patient; samples of a group are in one part.
        notes: for the user, to which those of the division are added.

    Raises:
        DataError: no images; for training also fewer than two classes, a class without images in either part, or a held-out class that is
            not in the training part.
    """
    pairs = {part: list(zip(*listing, strict=True)) for part, listing in parts.items()}
    listed = dict.fromkeys(label for part in pairs.values() for _, label in part)
    if split is None and (first := pairs.get("train", pairs.get(""))) is not None:
        if not first:
            raise DataError(f"{name} holds no training images")
        learned = dict.fromkeys(label for _, label in first)
    else:
        learned = listed
    notes = list(notes)
    if classes is not None and (unseen := [label for label in classes if label not in listed]):
        notes.append(f"{name}: {len(unseen)} of {len(classes)} class names have no images and are left out: {few(unseen)}")
        classes = [label for label in classes if label in listed]
    classes = classes or sorted(learned, key=natural_order)
    numbers = {label: number for number, label in enumerate(classes)}
    if split is None:
        _check_classes(name, pairs, classes, numbers)
    found = divide(name, pairs, lambda whole: _split(name, whole, val_fraction, seed, groups), val_fraction=val_fraction, split=split)
    if not found.val:
        raise DataError(f"{name} holds no images in its held-out part; add some, or remove it to hold out a part of the training set")
    if split is None:
        for part, samples in (("training", found.train), ("held-out", found.val)):
            _check_all_present(name, part, samples, classes)
    sets = [make([sample for sample, _ in part], [numbers[label] for _, label in part]) for part in (found.train, found.val)]
    return ImageData(name, sets[0], sets[1], classes, notes=(*notes, *found.notes), part=found.part, drawn=found.drawn)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which "class 10" comes after "class 9"."""
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d{1,18})", name) if piece]


def few(names: Sequence[Any], count: int = 5) -> str:
    """Return a short list for messages: 'a, b, c and 7 more'."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(str, names[:count])) + more


def split_groups(samples: list[T], groups: Sequence[str], val_fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split samples at random into (training, held-out) so that no group is in both. At least two groups are needed."""
    everyone = sorted(set(groups))
    count = min(max(1, round(val_fraction * len(everyone))), len(everyone) - 1)
    held_out = set(random.Random(f"{seed} multilabel").sample(everyone, count))
    parts: list[list[T]] = [[s for s, group in zip(samples, groups, strict=True) if (group in held_out) is held] for held in (False, True)]
    return parts[0], parts[1]


def _check_classes(name: str, pairs: Mapping[str, list[tuple[Any, str]]], classes: list[str], numbers: dict[str, int]) -> None:
    if len(classes) < 2 and ("train" in pairs or "" in pairs):
        raise DataError(f"{name} has only one class, {classes[0]!r}; training a classifier needs at least two")
    for part in ("", "train", "val" if "val" in pairs else "test"):
        samples = pairs.get(part, [])
        if unknown := sorted({label for _, label in samples} - numbers.keys(), key=natural_order):
            hint = nearest(unknown[0], numbers)
            which = "training" if part in ("", "train") else "held-out"
            raise DataError(f"{name}: the {which} part has unknown classes: {few(unknown)}{hint} (known: {few(list(numbers))})")


def _check_all_present(name: str, part: str, samples: list[tuple[Any, str]], classes: list[str]) -> None:
    present = {label for _, label in samples}
    if absent := [label for label in classes if label not in present]:
        what = f"{len(absent)} of {len(classes)} classes have no {part} images: {few(absent)}"
        raise DataError(f"{name}: {what}; add images to them or remove them")


def _split(name: str, samples: list[Any], val_fraction: float, seed: int, groups: Mapping[Any, str] | None) -> tuple[list[Any], list[Any]]:
    """Split (sample, label) pairs by class, or by group, at random: (training, held-out)."""
    if groups is not None:
        owners = [groups[sample] for sample, _ in samples]
        if len(set(owners)) < 2:
            raise DataError(f"{name} has one group, {few(owners, 1)}, which cannot be divided; at least two are needed")
        return split_groups(samples, owners, val_fraction, seed)
    counts = Counter(label for _, label in samples)
    if alone := sorted((label for label, count in counts.items() if count == 1), key=natural_order):
        raise DataError(f"{name}: a class with one image cannot be split; add images to these classes: {few(alone)}")
    order = {label: number for number, label in enumerate(sorted(counts, key=natural_order))}
    train, val = stratified_split([order[label] for _, label in samples], val_fraction, seed)
    return [samples[i] for i in train], [samples[i] for i in val]
