"""Samplers: functions from a prediction, noise and a grid of times to data.

A prediction is called as predict(x, t, decided_at=None): x (B, C, H, W), t one time; `decided_at` is the time that guidance intervals are
compared with, if it is not t (`guided` makes a prediction from a model and labels). Integration runs in x's dtype, preferably float64; the
model may compute in another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vitarium.errors import UsageError, nearest
from vitarium.generation.diffusion.gaussian import GaussianDiffusion
from vitarium.generation.diffusion.paths import Path
from vitarium.generation.noise import ImageNoise

LAST_STEPS = ("mean", "euler", "tweedie", "none")
"""Last steps of the stochastic sampler of flows."""
Noise = torch.Generator | ImageNoise
"""Source of a stochastic sampler's noise: one generator for the batch, or one stream per image."""


class Predict(Protocol):
    """Prediction of a model for (B, C, H, W) and a time."""

    def __call__(self, x: Tensor, t: float, decided_at: float | None = None) -> Tensor: ...


def noise_like(x: Tensor, generator: Noise | None) -> Tensor:
    """Return standard normal numbers of x's shape, drawn in float32 on the generator's device: the same on every device, in any dtype."""
    if isinstance(generator, ImageNoise):
        return generator.normal(*x.shape[1:]).to(x)
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device).to(x)


# ---- flows: predict returns velocities


def euler(predict: Predict, x: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate by Euler's method along `times`, which may run either way. One evaluation per step."""
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * predict(x, now)
    return x


def heun(predict: Predict, x: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate by Heun's method; the last step is Euler's, because some paths have no velocity at the data. Two evaluations per step.

    Guidance is decided by the time at which a step begins, in both of its evaluations (as in REPA's sampler).
    """
    for i, (now, then) in enumerate(itertools.pairwise(times)):
        slope = predict(x, now)
        guess = x + (then - now) * slope
        if i < len(times) - 2:
            guess = x + (then - now) * (slope + predict(guess, then, decided_at=now)) / 2
        x = guess
    return x


def dopri5(predict: Predict, x: Tensor, times: Sequence[float], *, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Integrate by Dormand and Prince's adaptive method of order 5 (scipy's) from the first to the last of `times`."""
    import numpy as np
    from scipy.integrate import solve_ivp

    def slope(t: float, flat: Any) -> Any:
        return predict(torch.from_numpy(np.asarray(flat)).view(x.shape).to(x), t).double().cpu().flatten().numpy()

    found = solve_ivp(slope, (times[0], times[-1]), x.double().cpu().flatten().numpy(), method="RK45", rtol=rtol, atol=atol)
    return torch.from_numpy(found.y[:, -1]).view(x.shape).to(x)


def sde(
    predict: Predict,
    x: Tensor,
    times: Sequence[float],
    path: Path,
    *,
    form: str = "linear",
    norm: float = 1.0,
    solver: str = "euler",
    last: str = "mean",
    generator: Noise | None = None,
) -> Tensor:
    """Integrate dx = (v + w score) dt + sqrt(2 w dt) noise with time towards the data; see `Path.sde_rate` for w.

    The last step adds no noise. Guided velocities give guided scores, since a score is affine in its velocity.

    Args:
        form, norm: of w.
        solver: "euler" (Euler-Maruyama), or "heun" (SiT's: the noise is added first, then the mean of two drifts; two evaluations).
        last: the last step: "mean" (the drift without noise), "euler" (the velocity alone), "tweedie" (the expected data) or "none".

    Raises:
        UsageError: another solver or last step.
    """
    for value, known, what in ((solver, ("euler", "heun"), "solver"), (last, LAST_STEPS, "last")):
        if value not in known:
            raise UsageError(f"{what} of the sampler sde must be {', '.join(known)}; got {value!r}{nearest(str(value), known)}")
    sign = 1.0 if path.data_at == 1 else -1.0

    def terms(x: Tensor, at: float, decided_at: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity, the score and the rate w at a time."""
        t = torch.tensor(at, dtype=x.dtype, device=x.device)
        velocity = predict(x, at, decided_at)
        return sign * velocity, path.score_of(velocity, x, t), path.sde_rate(t, form, norm)

    for i, (now, then) in enumerate(itertools.pairwise(times)):
        step, is_last = abs(then - now), i == len(times) - 2
        if is_last and last == "none":
            return x
        noise = noise_like(x, generator) if not is_last else None
        if solver == "heun" and noise is not None:
            rate = path.sde_rate(torch.tensor(now, dtype=x.dtype, device=x.device), form, norm)
            moved = x + (2 * rate * step).sqrt() * noise
            velocity, score, rate = terms(moved, now)
            first = velocity + rate * score
            velocity, score, rate = terms(moved + step * first, then, decided_at=now)
            x = moved + step * (first + velocity + rate * score) / 2
            continue
        velocity, score, rate = terms(x, now)
        if is_last and last == "tweedie":
            alpha, sigma, _, _ = path.coefficients(torch.tensor(now, dtype=x.dtype, device=x.device))
            return (x + sigma**2 * score) / alpha
        x = x + step * (velocity if is_last and last == "euler" else velocity + rate * score)
        if noise is not None:
            x = x + (2 * rate * step).sqrt() * noise
    return x


# ---- Gaussian diffusion: predict returns the predicted quantity (noise, data or v), with or without a learned variance


def ddpm(
    predict: Predict,
    x: Tensor,
    diffusion: GaussianDiffusion,
    steps: Sequence[int],
    *,
    clip: bool = False,
    generator: Noise | None = None,
) -> Tensor:
    """Sample ancestrally through the original steps in `steps` (ascending), last to first. `clip` limits the data to [-1, 1]."""
    tables = diffusion.respaced(steps)
    for i in reversed(range(len(steps))):
        data, _, log_variance = tables.read(predict(x, steps[i]), x, i, clip)
        x = float(tables.posterior_data[i]) * data + float(tables.posterior_x[i]) * x
        if i:
            x = x + torch.exp(0.5 * log_variance) * noise_like(x, generator)
    return x


def ddim(
    predict: Predict,
    x: Tensor,
    diffusion: GaussianDiffusion,
    steps: Sequence[int],
    *,
    eta: float = 0.0,
    clip: bool = False,
    generator: Noise | None = None,
) -> Tensor:
    """Sample by DDIM through the original steps in `steps` (ascending), last to first; `eta` 0 adds no noise, 1 as much as DDPM."""
    tables = diffusion.respaced(steps)
    for i in reversed(range(len(steps))):
        data, noise, _ = tables.read(predict(x, steps[i]), x, i, clip)
        here, before = float(tables.alpha_bar[i]), float(tables.alpha_bar_before[i])
        spread = eta * ((1 - before) / (1 - here) * (1 - here / before)) ** 0.5
        x = before**0.5 * data + (1 - before - spread**2) ** 0.5 * noise
        if i and eta:
            x = x + spread * noise_like(x, generator)
    return x
