"""Fréchet distance between two sets of images, as Gaussians in the feature space of a named network.

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        (Heusel et al. 2017; S unbiased covariances, all in float64)

Published FIDs use an Inception network and 50,000 images; values for another extractor or fewer images are comparable only to each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

PIXELS = "pixels"
"""Extractor without weights: 8x8 grey levels."""


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Return the distance of two Gaussians, a scalar: means (D,), covariances (D, D), preferably float64.

    The trace of the root is a sum over eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: rank-deficient covariances are no problem.
    """
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross).clamp(min=0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D), float64, of features (N, D) with N at least 2."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def pixel_features(image: Tensor) -> Tensor:
    """Shrink images (B, C, H, W) in [0, 1] to 8x8 grey levels: (B, 64)."""
    return F.adaptive_avg_pool2d(image.float().mean(1, keepdim=True), 8).flatten(1)


def extractor(name: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return a function from images in [0, 1] to features (B, D), and D: "pixels", or an encoder's name or file (mean over its map)."""
    if name == PIXELS:
        return pixel_features, 64
    path = Path(name)
    encoder = _encoder(name, path.stat().st_mtime_ns if path.is_file() else None)
    return encoder.pooled, encoder.dim


@functools.lru_cache(maxsize=1)
def _encoder(name: str, _changed: int | None) -> Any:
    """Open an encoder; kept for the next evaluation, and opened again if its file has changed."""
    from vitarium.generation.diffusion.alignment import open_encoder

    return open_encoder(name)


class FrechetDistance(Metric):
    """Fréchet distance between two sets of images, accumulated over batches and processes.

    Args:
        features: function from images (B, C, H, W) in [0, 1] to (B, dim).
        dim: D.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, features: Callable[[Tensor], Tensor], dim: int, **options: Any):
        super().__init__(**options)
        self.features = features
        for kind in ("real", "made"):
            self.add_state(f"{kind}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_products", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, *, real: bool) -> None:
        """Add images (B, C, H, W) in [0, 1] to one of the two sets."""
        found, kind = self.features(images).double(), "real" if real else "made"
        for name, value in (("count", float(len(found))), ("sum", found.sum(0)), ("products", found.T @ found)):
            setattr(self, f"{kind}_{name}", getattr(self, f"{kind}_{name}") + value)

    def compute(self) -> Tensor:
        """Return the distance, a scalar; NaN if a set has fewer than 2 images."""
        if float(self.real_count) < 2 or float(self.made_count) < 2:  # type: ignore[arg-type]
            return torch.tensor(float("nan"))
        return frechet_distance(*self._moments("real"), *self._moments("made"))

    def _moments(self, kind: str) -> tuple[Tensor, Tensor]:
        count, total, products = (getattr(self, f"{kind}_{part}") for part in ("count", "sum", "products"))
        mean = total / count
        return mean, (products - count * torch.outer(mean, mean)) / (count - 1)
