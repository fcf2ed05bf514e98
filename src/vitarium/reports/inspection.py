"""Description of the data of a comparison: sizes, images by class, examples, duplicates, and baselines that are no models."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vitarium.data import ImageData
from vitarium.reports.baselines import pixel_regression
from vitarium.reports.duplicates import Duplicates, find_duplicates
from vitarium.reports.looking import Looked, look

EXAMPLES = 20
"""Images of the sheet of examples."""


@dataclass(frozen=True)
class Example:
    """An example of the training images.

    Attributes:
        index: place in the training part.
        source: path or identifier.
        label: class name; "" where there is none.
    """

    index: int
    source: str
    label: str = ""


@dataclass(frozen=True)
class Inspection:
    """Description of the data of a comparison, made before any training.

    Attributes:
        sizes: [width, height] in pixels of the images: "least" and "most" of either side, and "median"; {} where no image was read.
        counts: [training, held-out] images of each class, in the order of the classes; [] for other targets than classes.
        examples: of every class in turn.
        duplicates: see `Duplicates`.
        baselines: answers of no model, {"name", metric: value, ...} (see `pixel_regression`).
    """

    sizes: dict[str, list[int]] = field(default_factory=dict)
    counts: list[list[int]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    duplicates: Duplicates = field(default_factory=lambda: Duplicates(0, 0))
    baselines: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Inspection:
        """Make an inspection from the values of `to_dict`."""
        examples = [Example(**example) for example in values["examples"]]
        return cls(**{**values, "examples": examples, "duplicates": Duplicates(**values["duplicates"])})


def inspect(data: ImageData, *, classes: bool, seed: int = 0) -> Inspection:
    """Look at the images of a data set, in seconds (see `looking`).

    Args:
        data: both parts.
        classes: whether the targets are class numbers.
        seed: of the sample that is looked at.
    """
    looked = look(data, seed=seed)
    counts: list[list[int]] = []
    if classes:
        train, val = (Counter(int(target) for target in part.targets) for part in (data.train, data.val))
        counts = [[train[i], val[i]] for i in range(len(data.classes))]
    regression = pixel_regression(data, looked) if classes else None
    return Inspection(
        _sizes(looked),
        counts,
        _examples(data, looked, classes=classes),
        find_duplicates(data, looked),
        [regression] if regression else [],
    )


def _sizes(looked: Looked) -> dict[str, list[int]]:
    if not len(looked):
        return {}
    found = {"least": looked.size.min(0), "median": np.median(looked.size, axis=0), "most": looked.size.max(0)}
    return {name: [int(side) for side in value] for name, value in found.items()}


def _examples(data: ImageData, looked: Looked, *, classes: bool) -> list[Example]:
    """Return training images that were looked at, of every class in turn."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in looked.index[looked.part == 0].tolist():
        by_class[int(data.train.targets[index]) if classes else 0].append(index)
    turns = sorted((turn, label, index) for label, indices in by_class.items() for turn, index in enumerate(indices))[:EXAMPLES]
    name = lambda label: data.classes[label] if classes and label < len(data.classes) else ""
    return [Example(index, data.train.describe(index), name(label)) for _, label, index in turns]
