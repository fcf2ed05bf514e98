"""Image sets: labelled images by index, views of them, and their split into training and validation parts."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vitarium.data.sample import Sample
from vitarium.texts import encodable


@runtime_checkable
class ImageSet(Protocol):
    """Interface of labelled images that are accessed by index.

    `images[i]` returns (image, class number), or (clip, class number) for videos, and raises `BrokenImage` for an unreadable file.
    `targets` holds all class numbers without opening an image; `describe(i)` names a sample (a path, or a place in an archive).
    """

    targets: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def describe(self, index: int) -> str: ...


@dataclass(frozen=True)
class ImageData:
    """A classification data set with its validation part.

    Attributes:
        name: name for reports.
        train, val: the two parts, without common images.
        classes: class names in the order of the class numbers.
        image_size: side of the images, pixels, if it is the same for all.
        notes: what was left out, ignored or assumed when the data was opened, a sentence each.
        part: which part of the data `val` is: "val", "test", or in an evaluation also "train" or "all".
        drawn: whether `val` was held out at random from the training images; False: the data has such a part; None: not known.
    """

    name: str
    train: ImageSet
    val: ImageSet
    classes: list[str]
    image_size: int | None = None
    notes: tuple[str, ...] = ()
    part: str = "val"
    drawn: bool | None = None

    def __post_init__(self) -> None:
        """Escape what is not UTF-8 in names of folders, because both names go into files."""
        object.__setattr__(self, "name", encodable(self.name))
        object.__setattr__(self, "classes", [encodable(label) for label in self.classes])


class Samples:
    """Image set over a list of samples that are read on access.

    Args:
        samples: arguments of `read`: paths, places in an archive, numbers of rendered images.
        targets: class number (or other target) of each sample; None if `read` returns the target, and the attribute is then all 0.
        read: maps a sample to an image, or to (image, target) without `targets`; raises `BrokenImage` for an unreadable file.
        name: maps a sample to its name in messages and reports; `str` by default.
    """

    def __init__(
        self, samples: Sequence[Any], targets: Sequence[Any] | None = None, *, read: Callable[[Any], Any], name: Callable[[Any], str] = str
    ):
        self.samples, self._read, self._name = samples, read, name
        self._read_target = targets is None
        self.targets: Any = [0] * len(samples) if targets is None else targets

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        read = self._read(self.samples[index])
        return read if self._read_target else (read, self.targets[index])

    def describe(self, index: int) -> str:
        """Return the name of a sample."""
        return self._name(self.samples[index])


class View:
    """View of an image set: a selection of its samples in a given order, with the same or other targets.

    Args:
        images: the underlying image set.
        indices: indices of the samples in order, possibly repeated; all by default.
        targets: target of each sample of the view; those of `images` by default.
        transform_target: function that is applied to each target on access (to segments, for example); `targets` stays unchanged.

    Raises:
        ValueError: both `targets` and `transform_target`, or `targets` of another length than the view.
    """

    def __init__(
        self,
        images: ImageSet,
        indices: Sequence[int] | None = None,
        *,
        targets: Sequence[Any] | None = None,
        transform_target: Callable[[Any], Any] | None = None,
    ):
        self.images, self.indices = images, list(range(len(images)) if indices is None else indices)
        if targets is not None and (transform_target is not None or len(targets) != len(self.indices)):
            raise ValueError(f"a view of {len(self.indices)} samples takes as many targets (got {len(targets)}) or transform_target")
        self._replaced, self._transform_target = targets is not None, transform_target
        self.targets: Any = [images.targets[i] for i in self.indices] if targets is None else list(targets)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item = self.images[self.indices[index]]
        if isinstance(item, Sample):
            if self._replaced:
                return Sample(item | {"target": self.targets[index]})  # type: ignore[return-value]
            return item if self._transform_target is None else item.map(target=self._transform_target)  # type: ignore[return-value]
        image, target = item
        if self._replaced:
            return image, self.targets[index]
        return image, target if self._transform_target is None else self._transform_target(target)

    def describe(self, index: int) -> str:
        """Return the name that the underlying set gives the sample."""
        return self.images.describe(self.indices[index])


class Joined:
    """Concatenation of image sets.

    Args:
        parts: image sets with the same classes.
    """

    def __init__(self, parts: Sequence[ImageSet]):
        self._places = [(part, i) for part in parts for i in range(len(part))]
        self.targets: Any = [target for part in parts for target in part.targets]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        part, i = self._places[index]
        return part[i]

    def describe(self, index: int) -> str:
        """Return the name that the sample has in its part."""
        part, i = self._places[index]
        return part.describe(i)


def distinct(images: Any) -> int:
    """Return the number of different images of an image set: a view may repeat some, and samples may be groups of images."""
    if isinstance(images, View):
        return len(set(images.indices))
    return len(images) if (inner := _wrapped(images)) is None else distinct(inner)


def _wrapped(images: Any) -> Any:
    """Return the set that another one, such as groups for retrieval, wraps as a whole; None if it is none of these."""
    return None if isinstance(images, View) else getattr(images, "images", None)


def size_of(data: ImageData) -> int:
    """Return the number of different samples of a data set, of which the part that is evaluated may contain the training part."""
    held_out = distinct(data.val)
    return held_out if data.part == "all" else held_out + (0 if data.part == "train" else distinct(data.train))


def files_of(images: Any) -> list[str]:
    """Return the paths of all files from which an image set reads its samples, each once; those of samples in archives are left out."""
    if (inner := _wrapped(images)) is not None:
        return files_of(inner)
    found: dict[str, None] = {}
    for index in range(len(images)):
        found.update(dict.fromkeys(path for path in _files_at(images, index) if os.path.isfile(path)))
    return list(found)


def _files_at(images: Any, index: int) -> tuple[Any, ...]:
    if isinstance(images, View):
        return _files_at(images.images, images.indices[index])
    if isinstance(images, Joined):
        part, inner = images._places[index]
        return _files_at(part, inner)
    if isinstance(images, Samples):
        sample = images.samples[index]
        parts = sample if isinstance(sample, tuple) else getattr(sample, "files", (sample,))
        return tuple(part for part in parts if isinstance(part, str))
    describe = getattr(images, "describe", None)
    return (describe(index),) if describe else ()


class Subset(View):
    """Selection of samples of an image set, in a given order."""

    def __init__(self, images: ImageSet, indices: Sequence[int]):
        super().__init__(images, indices)


def stratified_split(targets: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split samples by class into training and validation indices, each sorted.

    Every class with two or more samples is in both parts. The result depends only on the arguments.
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
