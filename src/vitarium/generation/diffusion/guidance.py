"""Classifier-free guidance (Ho and Salimans 2022), optionally limited to an interval of times (Kynkäänniemi et al. 2024).

out = u + s (c - u)        c: with the labels, u: with the null class
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitarium.errors import UsageError
from vitarium.generation.diffusion.samplers import Predict

EVERYWHERE = (0.0, 1.0)


def guided(
    model: Any,
    labels: Tensor,
    null: int,
    *,
    scale: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    channels: int | None = None,
    length: float | None = None,
) -> Predict:
    """Bind labels and guidance to a model, for samplers.

    Args:
        model: (x, t (B,), labels (B,)) -> (B, C or more, H, W).
        labels: (B,) int64.
        null: number of the null class.
        scale: s; 1 calls the model once per step, other values with the batch doubled.
        interval: times low <= t / length <= high, in the model's own time, at which guidance acts; elsewhere there is no guidance. (0, 1):
            at every time.
        channels: guide only the first channels (3 in DiT's and SiT's released samplers); None: all channels of x. Output beyond x's
            channels (a variance) is never guided.
        length: largest time; None: 1, as of flows. Timesteps (whole numbers) need it for an interval.

    Raises:
        UsageError: an interval that is no part of [0, 1]; in sampling, a time beyond `length`, or a timestep without it.
    """
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise UsageError(f"interval must be two shares of the time, 0 <= low <= high <= 1; got {tuple(interval)}")
    everywhere = scale != 1 and tuple(interval) == EVERYWHERE
    plain, doubled = {"labels": labels}, {"labels": torch.cat([labels, torch.full_like(labels, null)])}

    def predict(x: Tensor, t: float, decided_at: float | None = None) -> Tensor:
        if scale == 1 or not (everywhere or _inside(t if decided_at is None else decided_at, interval, length)):
            return call(model, x, t, plain)
        cond, free = call(model, torch.cat([x, x]), t, doubled).chunk(2)
        count = x.shape[1] if channels is None else min(channels, x.shape[1])
        moved = free[:, :count] + scale * (cond[:, :count] - free[:, :count])
        return torch.cat([moved, cond[:, count:]], 1) if count < cond.shape[1] else moved

    return predict


def _inside(t: float, interval: tuple[float, float], length: float | None) -> bool:
    """Return whether a time lies in an interval of shares of `length`."""
    if (length is None and isinstance(t, int)) or t > (length or 1.0) * (1 + 1e-6):
        known = "no length, which timesteps need" if length is None and isinstance(t, int) else f"length={length or 1.0}"
        raise UsageError(f"guidance in the interval {tuple(interval)} is asked for time {t} with {known}; give length=, the largest time")
    return interval[0] <= t / (length or 1.0) <= interval[1]


def call(model: Any, x: Tensor, t: float, condition: dict[str, Any]) -> Tensor:
    """Call the model in its own dtype at one time, and return its output in x's dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype) if hasattr(model, "parameters") else x.dtype
    times = torch.full((len(x),), t, dtype=torch.int64 if isinstance(t, int) else dtype, device=x.device)
    return model(x.to(dtype), times, **condition).to(x.dtype)
