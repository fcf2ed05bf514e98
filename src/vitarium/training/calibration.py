"""Temperature scaling (Guo et al., 2017): one number divides a classifier's logits, so that its confidence equals its accuracy.

The temperature is fitted by the cross entropy on one half of the held-out images and judged on the other half, which it has not seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.record import CalibrationRecord
from vitarium.data.bad_files import BadFiles
from vitarium.data.image_set import ImageSet
from vitarium.errors import DataError
from vitarium.training.evaluation import predict_logits

LOWEST, HIGHEST = 0.01, 100.0
"""Range of temperatures; a fit that reaches an end has not found a minimum."""
HALVINGS = 60
"""Steps of the bisection, after which the temperature is exact in double precision."""
BINS = 15
FEWEST = 20
"""Held-out images that a calibration needs at least."""


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature, with its effect on images that it was not fitted on.

    Attributes:
        temperature: by which the logits are divided.
        fitted: number of images of the fit.
        measured: number of other images, on which the following values are measured.
        error_before, error_after: expected calibration error, 15 bins, 0 to 1, with temperature 1 and with the fitted one.
        loss_before, loss_after: mean cross entropy (negative log-likelihood), in nats.
    """

    temperature: float
    fitted: int
    measured: int
    error_before: float
    error_after: float
    loss_before: float
    loss_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain values."""
        return asdict(self)

    def record(self) -> CalibrationRecord:
        """Return what a saved file records of it, beside the temperature."""
        return CalibrationRecord(**{name: value for name, value in asdict(self).items() if name != "temperature"})


def calibrate(model: nn.Module, images: ImageSet, *, seed: int = 0, batch_size: int = 64, bad_files: BadFiles | None = None) -> Calibration:
    """Fit a classifier's temperature on half of some images, and measure it on the other half. The model is unchanged.

    Args:
        model: a classifier; its outputs are logits (B, num_classes).
        images: that it was not trained on, with class numbers as targets.
        seed: of the halves, which depend on nothing else than it and the number of images.
        batch_size: images per forward pass.
        bad_files: record of images that cannot be read, which are left out.

    Raises:
        DataError: too few images, logits that are not finite, or answers from which no temperature follows.
    """
    logits, targets, _ = predict_logits(model, images, batch_size=batch_size, bad_files=bad_files)
    if len(logits) < FEWEST:
        raise DataError(f"a calibration needs at least {FEWEST} held-out images, and {len(logits)} could be read; give more of them")
    logits = logits.double()
    if not logits.isfinite().all():
        raise DataError("the model's outputs are not finite on some of the images, so it cannot be calibrated")
    first, second = halves(len(logits), seed)
    temperature = fit_temperature(logits[first], targets[first])
    before, after, wanted = logits[second], logits[second] / temperature, targets[second]
    errors = calibration_error(before, wanted), calibration_error(after, wanted)
    losses = float(F.cross_entropy(before, wanted)), float(F.cross_entropy(after, wanted))
    return Calibration(temperature, len(first), len(second), *errors, *losses)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two random halves of the numbers below `count`, int64; a function of the arguments alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature T with the smallest cross entropy of softmax(logits / T).

    The cross entropy is convex in b = 1 / T, with the derivative mean(sum_c p_c z_c - z_target), p = softmax(b z); its zero is found by
    bisection of log b.

    Args:
        logits: (N, num_classes) float64, finite.
        targets: (N,) int64.

    Raises:
        DataError: the minimum lies outside `LOWEST` to `HIGHEST`: all answers are right, so that no confidence is too high, or they are
            no better than chance.
    """
    wanted = logits.gather(1, targets[:, None])[:, 0]

    def slope(b: float) -> float:
        return float((((b * logits).softmax(1) * logits).sum(1) - wanted).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if slope(high) <= 0:  # 0 where the softmax is exactly one-hot
        raise DataError(
            f"every certainty is justified on the {len(logits)} images of the fit (nearly all are classified correctly), so no temperature "
            "can be fitted; give more or harder images"
        )
    if slope(low) > 0:
        raise DataError(
            f"the model's answers on the {len(logits)} images of the fit are no better than chance, so no temperature can be fitted; "
            "train it first, or check that the data is of its classes"
        )
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / (low * high) ** 0.5


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Return the expected calibration error (0 to 1): the mean over images of |confidence - accuracy| of their bins, `BINS` of equal width.

    Args:
        logits: (N, num_classes).
        targets: (N,) int64.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(logits.softmax(1), targets, num_classes=logits.shape[1], n_bins=BINS))
