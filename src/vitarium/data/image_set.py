"""What training, evaluation and reports need to know of labelled images, wherever they come from."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vitarium.data.sample import Sample


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


class Samples:
    """An image set over a list of samples, each of which is read when it is asked for.

    Args:
        samples: what `read` takes: paths, places in an archive, numbers of drawings.
        targets: class number (or another target) of each sample; None where `read` gives the target, and `targets` is then all 0.
        read: sample -> image, or sample -> (image, target) where there are no `targets`. Raises `BrokenImage` for an unreadable one.
        name: sample -> its name in messages and reports; the sample itself as text by default.
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
        """The sample's name."""
        return self._name(self.samples[index])


class View:
    """A view of an image set: some of its samples in a given order, with the same or other targets.

    Args:
        images: the image set.
        indices: which samples, in order, repetitions allowed; all by default.
        targets: target of each sample of the view; those of `images` by default.
        transform_target: applied to each target of `images` as it is read (segments, for example); `targets` is then as it was.

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
        """The name that `images` gives the sample."""
        return self.images.describe(self.indices[index])


class Joined:
    """Several image sets, one after the other.

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
        """The name that the sample has in its own set."""
        part, i = self._places[index]
        return part.describe(i)


class Subset(View):
    """Some samples of an image set, in a given order."""

    def __init__(self, images: ImageSet, indices: Sequence[int]):
        super().__init__(images, indices)


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
