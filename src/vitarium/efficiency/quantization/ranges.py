"""Range estimators, and the search for the quantization step with the least error.

seen = Observer(axis=-1)              # extremes of each channel; momentum= makes it a moving average, share= a percentile
seen(x)
step = symmetric_step(seen.amax, 8)
step = search_step(step, lambda s: squared_error(x, Integer(8).quantize(x, s)))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitarium.errors import UsageError

FACTORS = tuple(0.01 + 1.19 * i / 100 for i in range(100))
"""Factors of the first step that the search tries, as in PTQ4ViT (whose 101st candidate is never scored)."""


class Observer:
    """Running minimum and maximum of a tensor, or of each index of one axis.

    Args:
        axis: None: of the whole tensor; else the axis whose indices are observed one by one, such as 0 for rows or -1 for channels.
        momentum: None: extremes over all calls; else a moving average with this weight of each new call.
        share: 1: true extremes; below 1: the quantiles `1 - share` and `share` of each call.
    """

    def __init__(self, axis: int | None = None, *, momentum: float | None = None, share: float = 1.0):
        if not 0.5 < share <= 1:
            raise UsageError(f"share must be a quantile above 0.5 and up to 1 (1: the extremes), got {share!r}")
        if momentum is not None and not 0 < momentum <= 1:
            raise UsageError(f"momentum must be a number above 0 and up to 1, got {momentum!r}")
        self.axis, self.momentum, self.share = axis, momentum, share
        self._range: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> None:
        """Observe values (...)."""
        rows = x.detach().reshape(1, -1) if self.axis is None else x.detach().movedim(self.axis, 0).flatten(1)
        if self.share < 1:
            low, high = rows.quantile(1 - self.share, dim=1), rows.quantile(self.share, dim=1)
        else:
            low, high = rows.aminmax(dim=1)
        if self._range is not None and self.momentum is not None:
            low, high = (old + self.momentum * (new - old) for old, new in zip(self._range, (low, high), strict=True))
        elif self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range = low, high

    @property
    def low(self) -> Tensor:
        """Lowest values, (groups,)."""
        return self._seen()[0]

    @property
    def high(self) -> Tensor:
        """Highest values, (groups,)."""
        return self._seen()[1]

    @property
    def amax(self) -> Tensor:
        """Largest magnitudes, (groups,)."""
        return torch.maximum(-self.low, self.high)

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self._range is None:
            raise UsageError("this observer has not observed any values")
        return self._range


def symmetric_step(amax: Tensor, bits: int, *, margin: float = 0.5) -> Tensor:
    """Return the step of a signed integer grid that covers `amax`: amax / (2^(bits-1) - margin), at least the smallest normal number.

    Args:
        margin: 1 maps the largest value to the last code; with 0.5 it is rounded down to that code.
    """
    return (amax / (2 ** (bits - 1) - margin)).clamp(min=torch.finfo(amax.dtype).tiny)


def asymmetric_step(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return step and zero point of an unsigned grid from `low` to `high`: (high - low) / (2^bits - 1), round(-low / step)."""
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(low.dtype).tiny)
    return step, (-low / step).round()


def search_step(first: Tensor, error: Callable[[Tensor], Tensor], factors: tuple[float, ...] = FACTORS) -> Tensor:
    """Return, for each group, the step `first` times a factor with the least error; of equal ones the first.

    Args:
        first: first steps, any shape.
        error: step -> error, both of that shape; the error of a group depends on its own step alone.
    """
    best, least = first, torch.full_like(first, torch.inf)
    for factor in factors:
        step = first * factor
        found = error(step).view_as(first)
        better = found < least
        best, least = torch.where(better, step, best), torch.where(better, found, least)
    return best


def squared_error(x: Tensor, quantized: Tensor, axis: int | None = None) -> Tensor:
    """Return the sum of squared errors: a scalar, or one value for each index of an axis."""
    error = (x - quantized).square()
    return error.sum() if axis is None else error.movedim(axis, 0).flatten(1).sum(1)
