"""Bicubic resizing as MATLAB's `imresize` does it, which is what the benchmarks of super-resolution are made with.

PyTorch's and Pillow's antialiased bicubic have the same kernel and differ at the border: they leave out what lies outside and rescale,
MATLAB mirrors the picture (edge repeated). Elsewhere all three agree, and none of them agrees with bicubic without antialiasing, which
aliases when it shrinks: networks trained on it learn to undo another degradation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resize_bicubic(image: Tensor, scale: float) -> Tensor:
    """(..., H, W) floating-point -> (..., ceil(scale H), ceil(scale W)), in the same dtype, not clipped.

    Shrinking widens the kernel (a = -0.5) by 1 / scale. Raises ValueError where `scale` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    for axis in (-2, -1):
        image = _resize_axis(image, axis, scale)
    return image


def _resize_axis(image: Tensor, axis: int, scale: float) -> Tensor:
    places, weights = bicubic_taps(image.shape[axis], scale)
    places, weights = places.to(image.device), weights.to(image)
    shape = (-1, 1) if axis == -2 else (-1,)
    total = image.index_select(axis, places[:, 0]) * weights[:, 0].view(shape)
    for k in range(1, places.shape[1]):  # a tap at a time: large pictures must not be held once a tap
        total.addcmul_(image.index_select(axis, places[:, k]), weights[:, k].view(shape))
    return total


def bicubic_taps(side: int, scale: float) -> tuple[Tensor, Tensor]:
    """Which places of an axis of `side` each place of the result is made of, and how much of each: (out, taps) int64, float64."""
    width = 4 / min(scale, 1.0)
    count = math.ceil(scale * side)
    centre = (torch.arange(count, dtype=torch.float64) + 0.5) / scale - 0.5
    first = torch.floor(centre - width / 2).long()
    places = first[:, None] + torch.arange(math.ceil(width) + 2)
    weights = _cubic((centre[:, None] - places) * min(scale, 1.0))
    weights = weights / weights.sum(1, keepdim=True)
    used = weights.abs().amax(0) > 0
    places = places % (2 * side)
    return torch.minimum(places, 2 * side - 1 - places)[:, used], weights[:, used]


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    x = x.abs()
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0.0))
