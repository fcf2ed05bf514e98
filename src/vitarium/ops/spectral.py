"""Filters in the Fourier domain, and the discrete cosine transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.ops.precision import without_autocast


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each channel circularly with a kernel as large as the map, as a product of spectra.

    Args:
        x: (B, C, H, W); half precision is computed in float32, because spectra in half precision overflow.
        weight: (C, h, w, 2), real and imaginary parts of the filter on the grid of `torch.fft.rfft2`. If that is not the map's grid,
            (H, W // 2 + 1), the filter is resized bilinearly, corner to corner.

    Returns:
        (B, C, H, W), in x's dtype.

    Source: GFNet (Rao et al. 2021); the resizing follows HorNet.
    """
    height, width = x.shape[-2:]
    exact = torch.float64 if x.dtype is torch.float64 else torch.float32
    with without_autocast(x):
        spectrum = torch.fft.rfft2(x.to(exact), norm="ortho")
        grid = (height, width // 2 + 1)
        weight = weight.to(exact)
        if tuple(weight.shape[1:3]) != grid:
            weight = resize_filter(weight, grid)
        return torch.fft.irfft2(spectrum * torch.view_as_complex(weight.contiguous()), s=(height, width), norm="ortho").to(x.dtype)


def resize_filter(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a filter of `global_filter` to another grid of frequencies, bilinear, corner to corner: (C, h, w, 2) -> (C, *grid, 2)."""
    return F.interpolate(weight.permute(3, 0, 1, 2), grid, mode="bilinear", align_corners=True).permute(1, 2, 3, 0)


def dct_matrix(size: int, keep: int, like: Tensor) -> Tensor:
    """Return the first `keep` rows of the orthonormal DCT-II matrix of `size` samples: (keep, size)."""
    line = torch.arange(size, device=like.device, dtype=torch.float64) + 0.5
    rows = torch.arange(keep, device=like.device, dtype=torch.float64)
    matrix = (math.pi / size * rows[:, None] * line).cos() * (2 / size) ** 0.5
    return torch.where(rows[:, None] == 0, size**-0.5, matrix).to(like.dtype)


def dct2(x: Tensor, keep: tuple[int, int] | None = None) -> Tensor:
    """Compute the orthonormal DCT-II of the last two axes, or its lowest frequencies: (..., H, W) -> (..., *keep), by default (..., H, W).

    Half precision is computed and returned in float32: the first coefficient is sqrt(H W) times the mean.

    Raises:
        ValueError: `keep` exceeds the number of samples.
    """
    height, width = x.shape[-2:]
    rows, columns = keep or (height, width)
    if rows > height or columns > width:
        raise ValueError(f"a map of {height}x{width} has {height}x{width} coefficients, not {rows}x{columns}")
    with without_autocast(x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return dct_matrix(height, rows, x) @ x @ dct_matrix(width, columns, x).T


def idct2(coefficients: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Invert `dct2`, with zeros for missing frequencies: (..., h, w) -> (..., *size), by default (..., h, w)."""
    rows, columns = coefficients.shape[-2:]
    height, width = size or (rows, columns)
    with without_autocast(coefficients):
        x = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
        return dct_matrix(height, rows, x).T @ x @ dct_matrix(width, columns, x)
