"""Filters in the Fourier domain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """A circular convolution of each channel with a kernel as large as the map, written as a product of spectra.

    Args:
        x: (B, C, H, W); half precision is computed in float32, as spectra of half precision overflow.
        weight: (C, h, w, 2), real and imaginary parts of the filter on the grid of `torch.fft.rfft2`. Where that is not the map's,
            (H, W // 2 + 1), the filter is resized bilinearly, corner to corner.

    Returns:
        (B, C, H, W), in x's dtype.

    Source: GFNet (Rao et al. 2021), its resizing as in HorNet.
    """
    height, width = x.shape[-2:]
    exact = torch.float64 if x.dtype is torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfft2(x.to(exact), norm="ortho")
        grid = (height, width // 2 + 1)
        weight = weight.to(exact)
        if tuple(weight.shape[1:3]) != grid:
            weight = resize_filter(weight, grid)
        return torch.fft.irfft2(spectrum * torch.view_as_complex(weight.contiguous()), s=(height, width), norm="ortho").to(x.dtype)


def resize_filter(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """A filter of `global_filter` for another grid of frequencies, bilinear, corner to corner: (C, h, w, 2) -> (C, *grid, 2)."""
    return F.interpolate(weight.permute(3, 0, 1, 2), grid, mode="bilinear", align_corners=True).permute(1, 2, 3, 0)
