"""Error of a classifier under ImageNet-C's corruptions, on any labelled images.

    found = corruption_errors(model, data.val)
    found.mean                         # mean corruption error, 0 to 1: over severities, then over kinds
    found.errors["fog"]                # at severities 1 to 5

Each image is resized to the model's input, corrupted, and normalised. Random numbers depend only on (seed, image, kind, severity), so that
two models of one input size get the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.catalog.preprocessing import Preprocessing, to_mode
from vitarium.data.bad_files import BadFiles
from vitarium.data.loader import Loader
from vitarium.errors import DataError, UsageError, nearest
from vitarium.nn.modes import evaluating
from vitarium.robustness.corruptions import KINDS, SEVERITIES, available_kinds, corrupt

ALEXNET = dict(
    zip(KINDS, (0.886, 0.894, 0.923, 0.820, 0.826, 0.786, 0.798, 0.867, 0.827, 0.819, 0.565, 0.853, 0.646, 0.718, 0.607), strict=True)
)
"""AlexNet's error on ImageNet-C for each kind (mean over severities), by which the published mCE is normalised."""


@dataclass(frozen=True)
class CorruptionErrors:
    """Result of `corruption_errors`. Errors are in [0, 1].

    Attributes:
        clean: error on the uncorrupted images.
        errors: kind -> errors at the severities.
        severities: the severities measured.
        images: number of images.
    """

    clean: float
    errors: dict[str, list[float]]
    severities: list[int]
    images: int

    @property
    def by_kind(self) -> dict[str, float]:
        """Return the error of each kind, mean over the severities."""
        return {kind: sum(values) / len(values) for kind, values in self.errors.items()}

    @property
    def mean(self) -> float:
        """Mean corruption error: over severities, then over kinds, without normalisation by another model's."""
        return sum(self.by_kind.values()) / len(self.errors)

    @property
    def over_alexnet(self) -> float:
        """Return the published mCE: mean over kinds of error / AlexNet's error. Meaningful only on ImageNet-1k's validation images, with
        all kinds and severities."""
        return sum(error / ALEXNET[kind] for kind, error in self.by_kind.items()) / len(self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary for JSON."""
        numbers = {"clean_error": self.clean, "mean_corruption_error": self.mean, "images": self.images}
        return {**numbers, "severities": self.severities, "by_kind": self.by_kind, "errors": self.errors}


class AllCorruptions:
    """Convert an image to float32 (1 + kinds x severities, C, size, size): uncorrupted, then each kind at each severity.

    Draws from NumPy's global generator, which the loader seeds by (seed, image).
    """

    def __init__(self, preprocessing: Preprocessing, kinds: Sequence[str], severities: Sequence[int]):
        self.preprocessing, self.kinds, self.severities = preprocessing, list(kinds), list(severities)

    def __call__(self, image: Image.Image) -> Tensor:
        key = np.random.randint(2**31)
        square = self.preprocessing.square(to_mode(image, 3))
        number = {kind: i for i, kind in enumerate(KINDS)}
        seen = [square]
        for kind in self.kinds:
            for severity in self.severities:
                seen.append(corrupt(square, kind, severity, np.random.default_rng([key, number[kind], severity])))
        return torch.stack([self.preprocessing.normalised(to_mode(image, self.preprocessing.channels)) for image in seen])


def corruption_errors(
    model: nn.Module,
    images: Any,
    *,
    kinds: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 64,
    seed: int = 0,
    num_workers: int = 0,
    bad_files: BadFiles | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> CorruptionErrors:
    """Measure a classifier on uncorrupted images and under each corruption; each image is read once.

    Args:
        model: image (B, C, H, W) -> logits (B, classes), on its device.
        images: an ImageSet with the model's class numbers.
        kinds: names of `corruptions.KINDS`; None: all available ones (`available_kinds`).
        severities: a selection of 1 to 5.
        batch_size: images per forward pass.
        num_workers: processes that read and corrupt images.
        bad_files: record of unreadable images, which are left out.
        progress: called with the number of finished images.

    Raises:
        UsageError: unknown kind or severity.
        MissingExtra: frost is requested and its photographs are not installed.
        DataError: no image can be read.
    """
    kinds, severities = list(kinds if kinds is not None else available_kinds()), list(severities)
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown corruption {kind!r}{nearest(kind, KINDS)} (accepted: {', '.join(KINDS)})")
    if not kinds or not severities or not set(severities) <= set(SEVERITIES):
        raise UsageError(f"at least one kind and severities from 1 to 5 are needed; got {kinds} and {severities}")
    transform = AllCorruptions(preprocessing_of(model), kinds, severities)
    versions = 1 + len(kinds) * len(severities)
    how: Any = dict(batch_size=max(1, batch_size // versions), seed=seed, num_workers=num_workers, bad_files=bad_files)
    place = next(model.parameters(), torch.empty(0))
    wrong, count = torch.zeros(versions, dtype=torch.int64), 0
    with evaluating(model, inference=True):
        for batch in Loader(images, transform, shuffle=False, **how).epoch(0):
            if not len(batch["index"]):
                continue
            image: Tensor = batch["image"]
            answers = torch.cat([model(part.to(place)).argmax(-1).cpu() for part in image.flatten(0, 1).split(batch_size)])
            wrong += (answers.view(-1, versions) != batch["target"][:, None]).sum(0)
            count += len(image)
            progress(count)
    if not count:
        raise DataError("no image of the data can be read")
    shares = (wrong / count).tolist()
    table = {kind: shares[1 + i * len(severities) : 1 + (i + 1) * len(severities)] for i, kind in enumerate(kinds)}
    return CorruptionErrors(shares[0], table, severities, count)
