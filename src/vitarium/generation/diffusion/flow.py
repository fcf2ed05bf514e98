"""Flow matching on a path (Lipman et al. 2023; SiT, Ma et al. 2024): a model learns velocities, and an ODE or SDE integrates them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitarium.errors import UsageError, nearest
from vitarium.generation.diffusion.paths import Path, over
from vitarium.generation.diffusion.samplers import Predict

PREDICTIONS = ("velocity", "noise", "data", "score")
WEIGHTS = ("none", "velocity", "likelihood")
TIMES = ("uniform", "lognormal")
LAST_SDE_STEP = 0.04  # length in time; it adds no noise (SiT, REPA)


@dataclass(frozen=True)
class Flow:
    """A flow: the path, the predicted quantity, and the distribution of training times.

    Args:
        path, data_at: see `Path`. SiT: data_at=1; REPA: data_at=0.
        prediction: "velocity", "noise", "data" or "score" (whose error is that of the noise -sigma score).
        time: "uniform", or "lognormal": the ratio of noise to data, sigma / alpha, is e^n with a standard normal number n (REPA). On the
            linear path this is the logistic function of n, on the cosine path 2/pi atan e^n.
        weight: of the error of noise or score at a time: "none", "velocity" ((w / sigma)^2, which makes it the error of the velocity) or
            "likelihood" (w / sigma^2), with w the rate of the path's own diffusion (SiT's weightings).
        shift: of the times towards noise, t' = s t / (1 + (s - 1) t) with t the time from the data; 1 is none. In training and sampling.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """

    path: str = "linear"
    data_at: int = 0
    prediction: str = "velocity"
    time: str = "uniform"
    shift: float = 1.0
    weight: str = "none"

    def __post_init__(self) -> None:
        choices = ((self.prediction, PREDICTIONS, "prediction"), (self.time, TIMES, "time"), (self.weight, WEIGHTS, "weight"))
        for value, known, what in choices:
            if value not in known:
                raise UsageError(f"{what} of a flow must be one of {', '.join(known)}; got {value!r}{nearest(str(value), known)}")
        if self.weight != "none" and self.prediction not in ("noise", "score"):
            raise UsageError(
                f"weight={self.weight} weighs the error of a predicted noise or score, not of {self.prediction}; use weight=none"
            )
        if self.shift <= 0:
            raise UsageError(f"shift must be above 0, got {self.shift}")
        _ = self.way  # raises for an unknown path

    @property
    def way(self) -> Path:
        """The path."""
        return Path(self.path, self.data_at)

    @property
    def margin(self) -> float:
        """Margins of time left out at both ends, where the path has no velocity or the prediction determines none (SiT's numbers)."""
        return 1e-3 if self.prediction != "velocity" else 1e-5 if self.path == "vp" else 0.0

    def _placed(self, from_data: Tensor) -> Tensor:
        """Shift times from the data (0) to noise (1), clip them to the margins, and convert them to the path's own time."""
        t = self.shift * from_data / (1 + (self.shift - 1) * from_data)
        t = self.margin + (1 - 2 * self.margin) * t
        return t if self.data_at == 0 else 1 - t

    def times(self, count: int, like: Tensor) -> Tensor:
        """Draw training times (B,), on `like`'s device and in its dtype."""
        if self.time == "lognormal":
            return self._placed(self.way.from_data_at(torch.randn(count, device=like.device, dtype=like.dtype)))
        return self._placed(torch.rand(count, device=like.device, dtype=like.dtype))

    def times_at(self, shares: Tensor) -> Tensor:
        """Return the times (B,) of shares from 0 (data) to 1 (noise), for evaluation."""
        return self._placed(shares)

    def grid(self, steps: int, *, stochastic: bool = False, start: float = 1.0) -> list[float]:
        """Return `steps` + 1 times from noise to data; a stochastic sampler's last step is 0.04 long.

        Args:
            steps: number of steps.
            stochastic: whether the grid is for a stochastic sampler.
            start: its first time, from 1 (noise) down; some rates of diffusion are infinite at 1.

        Raises:
            UsageError: fewer than 1 step.
        """
        if steps < 1:
            raise UsageError(f"sampling needs at least 1 step, got {steps}")
        if stochastic and steps > 1:
            from_data = torch.cat([torch.linspace(start, LAST_SDE_STEP, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        else:
            from_data = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return self._placed(from_data).tolist()

    def velocities(self, predict: Predict) -> Predict:
        """Convert a model's prediction to velocities."""
        if self.prediction == "velocity":
            return predict
        turn: Callable[..., Tensor] = getattr(self.way, f"velocity_of_{self.prediction}")

        def velocity(x: Tensor, t: float, decided_at: float | None = None) -> Tensor:
            return turn(predict(x, t, decided_at), x, torch.tensor(t, dtype=x.dtype, device=x.device))

        return velocity

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return data (B, C, H, W) with noise of its shape, at times (B,)."""
        return self.way.mix(x, noise, t)

    def loss(self, model: Any, x: Tensor, *, noise: Tensor | None = None, t: Tensor | None = None, **condition: Any) -> dict[str, Tensor]:
        """Return the loss of a batch, {"denoising": (B,)}: the mean square error of the prediction.

        Args:
            model: (x_t, t, **condition) -> (B, C or more, H, W), of which the first C channels are the prediction.
            x: data (B, C, H, W).
            noise, t: drawn if not given; t are times, (B,).
        """
        t = self.times(len(x), x) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        found = model(self.noised(x, noise, t), t, **condition)[:, : x.shape[1]]
        if self.prediction == "score":
            found, target = -over(self.way.coefficients(t)[1], x) * found, noise
        else:
            target = self.way.velocity(x, noise, t) if self.prediction == "velocity" else noise if self.prediction == "noise" else x
        return {"denoising": self._weights(t) * (found - target).square().flatten(1).mean(1)}

    def _weights(self, t: Tensor) -> Tensor | float:
        """Return the weights (B,) of the errors at times t."""
        if self.weight == "none":
            return 1.0
        rate, sigma = self.way.sde_rate(t, "vp"), self.way.coefficients(t)[1]
        return (rate / sigma).square() if self.weight == "velocity" else rate / sigma.square()
