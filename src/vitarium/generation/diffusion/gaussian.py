"""Gaussian diffusion in discrete steps, as in DiT (Ho et al. 2020, Nichol and Dhariwal 2021, Song et al. 2021).

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise,  t = 0 .. T - 1 from little noise to much,  abar_t = prod (1 - beta)

A model predicts the noise, the data, or v = sqrt(abar) noise - sqrt(1 - abar) x (which is not a flow's velocity). If it returns twice as
many channels, the second half interpolates the log variance between its bounds: logvar = f ln(beta) + (1 - f) ln(posterior variance),
f = (second half + 1) / 2; it is trained by the variational bound, with the prediction held fixed.
Tables are float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitarium.errors import UsageError, nearest
from vitarium.generation.diffusion.paths import over

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("noise", "data", "v")


@dataclass(frozen=True)
class GaussianDiffusion:
    """A noise schedule, and the quantity that the model predicts.

    Args:
        schedule: "linear" (beta from 1e-4 to 0.02, at 1000 steps) or "cosine".
        prediction: "noise", "data" or "v".
        steps: number of steps T.

    Raises:
        UsageError: an unknown schedule or prediction, or fewer than 2 steps.
    """

    schedule: str = "linear"
    prediction: str = "noise"
    steps: int = 1000

    def __post_init__(self) -> None:
        for value, known, what in ((self.schedule, SCHEDULES, "schedule"), (self.prediction, PREDICTIONS, "prediction")):
            if value not in known:
                raise UsageError(f"{what} of Gaussian diffusion must be {', '.join(known)}; got {value!r}{nearest(str(value), known)}")
        if self.steps < 2:
            raise UsageError(f"Gaussian diffusion needs at least 2 steps, got {self.steps}")

    @property
    def betas(self) -> np.ndarray:
        """Noise variances beta, (T,) float64."""
        count = self.steps
        if self.schedule == "linear":
            return np.linspace(1e-4, 0.02, count, dtype=np.float64) * (1000 / count)
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)])

    def respaced(self, steps: Sequence[int] | None = None) -> Tables:
        """Return the tables of a shorter diffusion through some of the steps (ascending); by default all."""
        bar = np.cumprod(1 - self.betas)
        kept = bar if steps is None else bar[list(steps)]
        return Tables(kept, self.prediction)

    def grid(self, count: int, *, stride: bool = False) -> list[int]:
        """Return `count` steps, ascending: the first, the last and evenly between them; or with `stride` every k-th from 0 (DDIM's).

        Raises:
            UsageError: fewer than 1, or more than T.
        """
        if not 1 <= count <= self.steps:
            raise UsageError(f"the number of steps must be from 1 to {self.steps}, got {count}")
        if not stride:
            return [round(i * (self.steps - 1) / max(1, count - 1)) for i in range(count)] if count > 1 else [self.steps - 1]
        every = next((k for k in range(1, self.steps + 1) if len(range(0, self.steps, k)) == count), self.steps // count)
        return list(range(0, self.steps, every))[-count:] if count > 1 else [self.steps - 1]

    def times_at(self, shares: Tensor) -> Tensor:
        """Return the steps (B,) of shares from 0 (data) to 1 (noise), for evaluation."""
        return (shares * self.steps).long().clamp(max=self.steps - 1)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return data (B, C, H, W) with noise of its shape, at steps (B,)."""
        bar = over(_at(self.respaced().alpha_bar, t), x)
        return bar.sqrt() * x + (1 - bar).sqrt() * noise

    def loss(self, model: Any, x: Tensor, *, noise: Tensor | None = None, t: Tensor | None = None, **condition: Any) -> dict[str, Tensor]:
        """Return the losses of a batch, (B,) each: "denoising" (mean square) and, if it is predicted, "variance" (bits per dimension).

        Args:
            model: (x_t, t, **condition) -> (B, C or 2C, H, W).
            x: data (B, C, H, W).
            noise, t: drawn if not given; t are steps, (B,) int64.
        """
        t = torch.randint(self.steps, (len(x),), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        tables = self.respaced()
        bar = over(_at(tables.alpha_bar, t), x)
        x_t = self.noised(x, noise, t)
        out = model(x_t, t, **condition)
        found, logits = out[:, : x.shape[1]], out[:, x.shape[1] :]
        target = {"noise": noise, "data": x, "v": bar.sqrt() * noise - (1 - bar).sqrt() * x}[self.prediction]
        losses = {"denoising": (found - target).square().flatten(1).mean(1)}
        if logits.shape[1]:
            losses["variance"] = tables.bound(torch.cat([found.detach(), logits], 1), x, x_t, t)
        return losses


class Tables:
    """Coefficients of each step, (n,) float64 each, as numpy arrays."""

    def __init__(self, alpha_bar: np.ndarray, prediction: str):
        self.prediction = prediction
        self.alpha_bar = alpha_bar
        self.alpha_bar_before = np.append(1.0, alpha_bar[:-1])
        self.betas = 1 - alpha_bar / self.alpha_bar_before
        left = 1 - alpha_bar
        variance = self.betas * (1 - self.alpha_bar_before) / left
        self.log_variance = np.log(np.append(variance[1], variance[1:]) if len(variance) > 1 else self.betas)  # the first is 0
        self.log_betas = np.log(self.betas)
        self.posterior_data = self.betas * np.sqrt(self.alpha_bar_before) / left
        self.posterior_x = (1 - self.alpha_bar_before) * np.sqrt(alpha_bar / self.alpha_bar_before) / left

    def read(self, out: Tensor, x_t: Tensor, i: Any, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return (data, noise, log variance) from a model's output at x_t; i: one step, or (B,) of them."""
        found, logits = out[:, : x_t.shape[1]], out[:, x_t.shape[1] :]
        bar, low, high = (self.pick(table, i, x_t) for table in (self.alpha_bar, self.log_variance, self.log_betas))
        if self.prediction == "noise":
            data = (x_t - (1 - bar).sqrt() * found) / bar.sqrt()
        else:
            data = found if self.prediction == "data" else bar.sqrt() * x_t - (1 - bar).sqrt() * found
        data = data.clamp(-1, 1) if clip else data
        noise = (x_t - bar.sqrt() * data) / (1 - bar).sqrt()
        share = (logits + 1) / 2
        return data, noise, share * high + (1 - share) * low if logits.shape[1] else low.expand_as(data)

    def bound(self, out: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the variational bound at steps t (B,), in bits per dimension: a divergence, at step 0 the likelihood of 8-bit pixels."""
        data, _, log_variance = self.read(out, x_t, t)
        from_data, from_x, true = (self.pick(table, t, x) for table in (self.posterior_data, self.posterior_x, self.log_variance))
        mean, true_mean = from_data * data + from_x * x_t, from_data * x + from_x * x_t
        divergence = 0.5 * (log_variance - true - 1 + torch.exp(true - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance))
        likelihood = -_discretised(x, mean, 0.5 * log_variance)
        each = torch.where(over(t, x) == 0, likelihood, divergence)
        return each.flatten(1).mean(1) / math.log(2)

    def pick(self, table: np.ndarray, i: Any, x: Tensor) -> Tensor:
        """Return a table's value at a step, or at the steps (B,) of a batch, in a shape that multiplies x."""
        return over(_at(table, i), x) if isinstance(i, Tensor) else torch.tensor(table[i], dtype=x.dtype, device=x.device)


def _at(table: np.ndarray, t: Tensor) -> Tensor:
    dtype = torch.float32 if t.device.type == "mps" else torch.float64  # MPS does not support float64
    return torch.from_numpy(table).to(t.device, dtype)[t]


def _discretised(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log likelihood of pixels in [-1, 1] in steps of 2 / 255 under a Gaussian, with the tanh approximation of its integral."""

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = torch.exp(-log_scale)
    upper, lower = below(inverse * (x - mean + 1 / 255)), below(inverse * (x - mean - 1 / 255))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()
