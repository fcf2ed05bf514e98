"""From what was seen to a step: range estimators, and the search for the step with the least error.

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
"""What the first step is multiplied by in the search, as in PTQ4ViT (whose 101st candidate is never scored)."""


class Observer:
    """Lowest and highest value of what passes, one pair for the tensor or for each index of an axis.

    Args:
        axis: None: one pair; else the axis that keeps its own pairs, such as 0 for rows of a weight or -1 for channels.
        momentum: None: extremes of everything; else a moving average that goes this share of the way at each call after the first.
        share: 1 for true extremes; below, the quantiles `1 - share` and `share` of each call.
    """

    def __init__(self, axis: int | None = None, *, momentum: float | None = None, share: float = 1.0):
        if not 0.5 < share <= 1:
            raise UsageError(f"share is a quantile in (0.5, 1], where 1 takes the extremes; got {share!r}")
        if momentum is not None and not 0 < momentum <= 1:
            raise UsageError(f"momentum is a share in (0, 1], got {momentum!r}")
        self.axis, self.momentum, self.share = axis, momentum, share
        self._range: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> None:
        """Take in values (...)."""
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
        """(groups,)."""
        return self._seen()[0]

    @property
    def high(self) -> Tensor:
        """(groups,)."""
        return self._seen()[1]

    @property
    def amax(self) -> Tensor:
        """Largest magnitude, (groups,)."""
        return torch.maximum(-self.low, self.high)

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self._range is None:
            raise UsageError("this observer has seen nothing yet")
        return self._range


def symmetric_step(amax: Tensor, bits: int, *, margin: float = 0.5) -> Tensor:
    """Step of a signed integer grid that reaches `amax`: amax / (2^(bits-1) - margin), at least the smallest normal number.

    Args:
        margin: 0.5 lets the largest value round down to the last code; 1 puts it on that code.
    """
    return (amax / (2 ** (bits - 1) - margin)).clamp(min=torch.finfo(amax.dtype).tiny)


def asymmetric_step(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of an unsigned grid from `low` to `high`: (high - low) / (2^bits - 1), round(-low / step)."""
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(low.dtype).tiny)
    return step, (-low / step).round()


def search_step(first: Tensor, error: Callable[[Tensor], Tensor], factors: tuple[float, ...] = FACTORS) -> Tensor:
    """Of `first` times each factor the step with the least error, for every group by itself; of equal ones the first.

    Args:
        first: any shape.
        error: a step of that shape -> its error, of that shape: each group's depends on its own step alone.
    """
    best, least = first, torch.full_like(first, torch.inf)
    for factor in factors:
        step = first * factor
        found = error(step).view_as(first)
        better = found < least
        best, least = torch.where(better, step, best), torch.where(better, found, least)
    return best


def squared_error(x: Tensor, quantized: Tensor, axis: int | None = None) -> Tensor:
    """Sum of squares of what was lost: a number, or one for each index of an axis."""
    error = (x - quantized).square()
    return error.sum() if axis is None else error.movedim(axis, 0).flatten(1).sum(1)
