"""Paths from noise to data, x_t = alpha(t) x + sigma(t) noise, and conversions between velocity, noise, data and score.

Two time conventions are in use, so a path names the time of its data: `data_at=1` (SiT, FiT, Lumina: t runs from noise to data) or
`data_at=0` (REPA, diffusers, FLUX: t is the amount of noise). Velocities are dx/dt in the path's own time.

With v = alpha' x + sigma' noise, solving the 2x2 system of x_t and v gives

    x = (sigma' x_t - sigma v) / D      noise = (alpha v - alpha' x_t) / D      D = alpha sigma' - alpha' sigma      score = -noise / sigma

Notation: x data, (B, ...); t time, (B,) or one number as a tensor ().
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.errors import UsageError, nearest

KINDS = ("linear", "cosine", "vp")
SDE_FORMS = ("constant", "vp", "sigma", "linear", "decreasing", "rise_and_fall")
BETA_MIN, BETA_MAX = 0.1, 20.0


@dataclass(frozen=True)
class Path:
    """Mixing of data and noise over time.

    Args:
        kind: with u the time towards data: "linear" (alpha u, sigma 1 - u), "cosine" (sin and cos of pi u / 2; SiT calls it GVP), "vp" (the
            variance-preserving diffusion with beta from 0.1 to 20).
        data_at: the time, 0 or 1, at which x_t is the data.

    Raises:
        UsageError: an unknown kind, or data_at other than 0 or 1.
    """

    kind: str = "linear"
    data_at: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"path must be one of {', '.join(KINDS)}; got {self.kind!r}{nearest(str(self.kind), KINDS)}")
        if self.data_at not in (0, 1):
            raise UsageError(f"data_at must be 0 or 1, the time of the data; got {self.data_at!r}")

    def towards_data(self, t: Tensor) -> Tensor:
        """Return u, 0 at noise and 1 at data."""
        return t if self.data_at == 1 else 1 - t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma, and their derivatives by t; each in t's shape."""
        u, sign = self.towards_data(t), 1.0 if self.data_at == 1 else -1.0
        if self.kind == "linear":
            one = torch.ones_like(u)
            return u, 1 - u, sign * one, -sign * one
        if self.kind == "cosine":
            angle, rate = u * math.pi / 2, sign * math.pi / 2
            return angle.sin(), angle.cos(), rate * angle.cos(), -rate * angle.sin()
        alpha = torch.exp(-0.25 * (1 - u) ** 2 * (BETA_MAX - BETA_MIN) - 0.5 * (1 - u) * BETA_MIN)
        d_alpha = sign * alpha * 0.5 * (BETA_MIN + (1 - u) * (BETA_MAX - BETA_MIN))
        sigma = (1 - alpha**2).sqrt()
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma

    def from_data_at(self, log_ratio: Tensor) -> Tensor:
        """Return the time from the data, 1 - u, at which log(sigma / alpha) has a value, in the value's shape; at most 1.

        linear: sigmoid(n); cosine: 2/pi atan(e^n); vp: the root of the exponent of alpha = (1 + e^2n)^(-1/2).
        """
        if self.kind == "linear":
            return log_ratio.sigmoid()
        if self.kind == "cosine":
            return log_ratio.exp().atan() * (2 / math.pi)
        exponent = F.softplus(2 * log_ratio) / 2  # -log alpha = s^2 (max - min) / 4 + s min / 2
        slope, rise = BETA_MIN / 2, (BETA_MAX - BETA_MIN) / 4
        return (2 * exponent / (slope + (slope**2 + 4 * rise * exponent).sqrt())).clamp(max=1)

    def mix(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t."""
        alpha, sigma, _, _ = (over(c, x) for c in self.coefficients(t))
        return alpha * x + sigma * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return dx_t / dt of a pair of data and noise."""
        _, _, d_alpha, d_sigma = (over(c, x) for c in self.coefficients(t))
        return d_alpha * x + d_sigma * noise

    def data_of(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the data from a velocity at x_t."""
        alpha, sigma, d_alpha, d_sigma = (over(c, x_t) for c in self.coefficients(t))
        return (d_sigma * x_t - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)

    def noise_of(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise from a velocity at x_t."""
        alpha, sigma, d_alpha, d_sigma = (over(c, x_t) for c in self.coefficients(t))
        return (alpha * velocity - d_alpha * x_t) / (alpha * d_sigma - d_alpha * sigma)

    def score_of(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of the log density at x_t from a velocity."""
        return -self.noise_of(velocity, x_t, t) / over(self.coefficients(t)[1], x_t)

    def velocity_of_noise(self, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity from noise, the inverse of `noise_of`; undefined at the noise end, where alpha is 0."""
        alpha, sigma, d_alpha, d_sigma = (over(c, x_t) for c in self.coefficients(t))
        return d_alpha * (x_t - sigma * noise) / alpha + d_sigma * noise

    def velocity_of_score(self, score: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity from the score, the inverse of `score_of`; undefined at the noise end, where alpha is 0."""
        return self.velocity_of_noise(-over(self.coefficients(t)[1], x_t) * score, x_t, t)

    def velocity_of_data(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity from data, the inverse of `data_of`; undefined at the data end, where sigma is 0."""
        alpha, sigma, d_alpha, d_sigma = (over(c, x_t) for c in self.coefficients(t))
        return d_alpha * x + d_sigma * (x_t - alpha * x) / sigma

    def sde_rate(self, t: Tensor, form: str = "sigma", norm: float = 1.0) -> Tensor:
        """Return w(t) >= 0 of the stochastic sampler dx = (v + w score) dt + sqrt(2 w dt) noise, in t's shape. Source: SiT's path.py.

        Args:
            form: "constant", "vp" (the diffusion that belongs to the path; SiT's SBDM), "sigma", "linear" (1 - u; REPA's, whose 2t counts
                twice ours), "decreasing", "rise_and_fall".
            norm: factor, inside the square of "decreasing".

        Raises:
            UsageError: an unknown form.
        """
        u = self.towards_data(t)
        alpha, sigma, d_alpha, d_sigma = Path(self.kind, data_at=1).coefficients(u)
        if form == "vp":
            return norm * (d_alpha / alpha * sigma**2 - sigma * d_sigma)
        forms = {
            "constant": torch.full_like(u, norm),
            "sigma": norm * sigma,
            "linear": norm * (1 - u),
            "decreasing": 0.25 * (norm * torch.cos(math.pi * u) + 1) ** 2,
            "rise_and_fall": norm * torch.sin(math.pi * u) ** 2,
        }
        if form not in forms:
            raise UsageError(f"form must be one of {', '.join(SDE_FORMS)}; got {form!r}{nearest(form, SDE_FORMS)}")
        return forms[form]


def over(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per sample, (B,) or (), to multiply (B, ...)."""
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient.to(x.dtype)
