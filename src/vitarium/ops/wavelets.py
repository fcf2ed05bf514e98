"""First level of the dual-tree complex wavelet transform: an image as a low-pass map and six oriented complex bands, and back.

    low = h0 along W, then along H
    lh = h0 along W, h1 along H;  hl = h1 along W, h0 along H;  hh = h1 along both
    each of the three, over sqrt 2, in quads [[a, b], [c, d]] -> two complex bands, (a - d) + i (b + c) and (a + d) + i (b - c)

Filters are near_sym_b (13 and 19 taps), and edges are mirrored half a sample outside. The result equals that of pytorch_wavelets'
DTCWTForward and DTCWTInverse with one level; no filter bank is stored in a model. The bands separate edges by direction, and their
magnitudes change little when the image is shifted.

Source: Kingsbury 2001; Selesnick, Baraniuk, Kingsbury 2005.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

H0 = (-0.0017578125, 0.0, 0.022265625, -0.046875, -0.0482421875, 0.296875, 0.55546875)
"""First half, with the middle, of the low-pass analysis filter of 13 taps."""
H1 = (
    *(-7.062639508928571e-05, 0.0, 0.0013419015066964285, -0.0018833705357142855, -0.007156808035714285),
    *(0.02385602678571429, 0.05564313616071428, -0.05168805803571428, -0.29975760323660716, 0.5594308035714286),
)
"""First half, with the middle, of the high-pass analysis filter of 19 taps."""
ORIENTATIONS = (15, 45, 75, 105, 135, 165)
"""Orientation of each of the six bands, in degrees."""


def symmetric(half: Sequence[float]) -> list[float]:
    """Return the symmetric filter of 2 n - 1 taps whose first n are given."""
    return [*half, *half[-2::-1]]


def modulated(taps: Sequence[float], sign: int) -> list[float]:
    """Return sign (-1)^n taps[n], the synthesis filter of the other band."""
    return [sign * (-1) ** n * tap for n, tap in enumerate(taps)]


FILTERS = {
    "h0": symmetric(H0),
    "h1": symmetric(H1),
    "g0": modulated(symmetric(H1), -1),
    "g1": modulated(symmetric(H0), 1),
}


@dataclass(frozen=True)
class FilterBank:
    """Filters as matrices that act along the rows and columns of a map, low-pass above high-pass: (2 H, H) and (2 W, W) each."""

    analyse_rows: Tensor
    analyse_columns: Tensor
    synthesise_rows: Tensor
    synthesise_columns: Tensor


def filter_matrix(taps: Sequence[float], size: int, like: Tensor) -> Tensor:
    """Return a filter as a matrix over a line of `size` samples, mirrored half a sample outside its ends: (size, size), output by input."""
    places = torch.arange(size, device=like.device)
    seen = (places[:, None] + torch.arange(len(taps), device=like.device) - len(taps) // 2) % (2 * size)
    seen = torch.where(seen < size, seen, 2 * size - 1 - seen)
    values = torch.tensor(taps, dtype=torch.float64, device=like.device)
    return ((seen[..., None] == places) * values[:, None]).sum(1).to(like.dtype)


def filter_bank(height: int, width: int, like: Tensor) -> FilterBank:
    """Return the filter bank of a map of that height and width, both even, in the dtype and on the device of `like`."""
    if height % 2 or width % 2:
        raise ValueError(f"the wavelets need an even height and width, got {height}x{width}; repeat the last row or column")
    pair = lambda low, high, size: torch.cat([filter_matrix(FILTERS[name], size, like) for name in (low, high)])
    return FilterBank(pair("h0", "h1", height), pair("h0", "h1", width), pair("g0", "g1", height), pair("g0", "g1", width))


def dtcwt(x: Tensor, bank: FilterBank | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Analyse a map with one level of the transform.

    Args:
        x: (B, C, H, W), H and W even.
        bank: a cached `filter_bank` of this size; None: computed here.

    Returns:
        low (B, C, H, W), and the real and imaginary parts of the bands in the order of `ORIENTATIONS`, (B, C, 6, H / 2, W / 2) each.
    """
    height, width = x.shape[-2:]
    bank = bank or filter_bank(height, width, x)
    along_w = x @ bank.analyse_columns.T
    low, lh = (bank.analyse_rows @ along_w[..., :width]).split(height, -2)
    hl, hh = (bank.analyse_rows @ along_w[..., width:]).split(height, -2)
    (r15, i15, r165, i165), (r45, i45, r135, i135), (r75, i75, r105, i105) = (_bands(m * 0.5**0.5) for m in (lh, hh, hl))
    return low, torch.stack([r15, r45, r75, r105, r135, r165], 2), torch.stack([i15, i45, i75, i105, i135, i165], 2)


def inverse_dtcwt(low: Tensor, real: Tensor, imaginary: Tensor, bank: FilterBank | None = None) -> Tensor:
    """Invert `dtcwt`: (B, C, H, W)."""
    height, width = low.shape[-2:]
    bank = bank or filter_bank(height, width, low)
    lh, hh, hl = (_quads(real[:, :, i], imaginary[:, :, i], real[:, :, j], imaginary[:, :, j]) for i, j in ((0, 5), (1, 4), (2, 3)))
    (g0, g1), columns = bank.synthesise_rows.split(height), bank.synthesise_columns
    low_columns, high_columns = g0 @ low + g1 @ lh, g0 @ hl + g1 @ hh
    return low_columns @ columns[:width].T + high_columns @ columns[width:].T


def _bands(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Combine quads into the real and imaginary parts of two bands: (B, C, 2 h, 2 w) -> four of (B, C, h, w)."""
    a, b, c, d = x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    return a - d, b + c, a + d, b - c


def _quads(r1: Tensor, i1: Tensor, r2: Tensor, i2: Tensor) -> Tensor:
    """Invert `_bands` up to its factor: four of (B, C, h, w) -> (B, C, 2 h, 2 w)."""
    quads = torch.stack([torch.stack([r1 + r2, i1 + i2], -1), torch.stack([i1 - i2, r2 - r1], -1)], -3)
    return quads.flatten(-4, -3).flatten(-2) * 0.5**0.5
