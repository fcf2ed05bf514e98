"""Bicubic resizing that equals MATLAB's `imresize`, with which the benchmarks of super-resolution are made.

PyTorch's and Pillow's antialiased bicubic use the same kernel and differ at the border: they drop samples outside the image and rescale
the weights, whereas MATLAB mirrors the image (edge repeated). Elsewhere all three agree. Bicubic without antialiasing differs everywhere:
it aliases when it shrinks, and networks trained on it learn to undo another degradation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resize_bicubic(image: Tensor, scale: float) -> Tensor:
    """Resize the last two axes by a factor.

    Args:
        image: (..., H, W), floating-point.
        scale: factor above 0; shrinking widens the kernel (a = -0.5) by 1 / scale.

    Returns:
        (..., ceil(scale H), ceil(scale W)) in the same dtype, not clipped.

    Raises:
        ValueError: `scale` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    image = image.contiguous()  # decoded images are interleaved, of which gathering takes fifty times as long
    for axis in (-2, -1):
        image = _resize_axis(image, axis, scale)
    return image


def _resize_axis(image: Tensor, axis: int, scale: float) -> Tensor:
    places, weights = bicubic_taps(image.shape[axis], scale)
    places, weights = places.to(image.device), weights.to(image)
    shape = (-1, 1) if axis == -2 else (-1,)
    total = image.index_select(axis, places[:, 0]) * weights[:, 0].view(shape)
    for k in range(1, places.shape[1]):  # one tap at a time, so that memory holds one copy of the image, not one a tap
        total.addcmul_(image.index_select(axis, places[:, k]), weights[:, k].view(shape))
    return total


def bicubic_taps(side: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the source indices and weights of each output sample along an axis of `side` samples: (out, taps) int64, float64."""
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
    """Evaluate Keys' cubic kernel with a = -0.5."""
    x = x.abs()
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0.0))
