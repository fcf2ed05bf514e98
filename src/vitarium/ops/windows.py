"""Windows on a map: partition and its inverse, and the token order of (shifted) windows.

Notation: B batch, H W map, C channels, M window side, n = M * M tokens per window, nW windows of the padded map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Pad with zeros at the bottom and the right until both sides are multiples of `size`: (B, H, W, C) -> (B, H', W', C)."""
    bottom, right = -x.shape[1] % size, -x.shape[2] % size
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cut a map with sides that are multiples of `size` into row-major windows: (B, H, W, C) -> (B * nW, size * size, C)."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // size, size, width // size, size, dim)
    return x.transpose(2, 3).reshape(-1, size * size, dim)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Invert `window_partition`: (B * nW, size * size, C) -> (B, height, width, C)."""
    dim = windows.shape[-1]
    x = windows.view(-1, height // size, width // size, size, size, dim)
    return x.transpose(2, 3).reshape(-1, height, width, dim)


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """Token order of a padded map in which the tokens of each window are adjacent.

    Attributes:
        order: (H' * W',) int64; position i of the window order holds token order[i] of the row-major padded map.
        inverse: (H' * W',) int64; token t of the padded map is at position inverse[t].
        inside: (H' * W', 1) bool in window order, False for padding; None without padding.
        region: (nW, n) int64; tokens of a window attend to each other only if their regions are equal; None: all do.
        size: side M of a window, tokens.
        unseen: value added to the attention logit of two tokens of different regions.
    """

    order: Tensor
    inverse: Tensor
    inside: Tensor | None
    region: Tensor | None
    size: int
    unseen: float


def window_layout(height: int, width: int, size: int, shift: tuple[int, int], device: torch.device | None = None) -> WindowLayout:
    """Return the layout of windows of side `size` on a map whose grid is shifted down and right by `shift` tokens, cyclically.

    The last windows of a shifted grid hold tokens from opposite borders of the map. Their regions are cut as by the Swin authors: on each
    axis at -size and at -shift.
    """
    padded = (height + -height % size, width + -width % size)
    axes = [torch.arange(side, device=device) for side in padded]
    rolled = [axis.roll(-s) for axis, s in zip(axes, shift, strict=True)]
    order = _in_windows(rolled[0][:, None] * padded[1] + rolled[1], size)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
    inside = region = None
    if padded != (height, width):
        inside = _in_windows((rolled[0][:, None] < height) & (rolled[1] < width), size)[:, None]
    if any(shift):
        rows, columns = (
            (axis >= side - size).long() + (axis >= side - s).long() if s else torch.zeros_like(axis)
            for axis, side, s in zip(axes, padded, shift, strict=True)
        )
        region = _in_windows(3 * rows[:, None] + columns, size).view(-1, size * size)
    return WindowLayout(order, inverse, inside, region, size, -100.0)  # -100 as in the Swin authors' code


def attention_layout(
    height: int, width: int, size: int, *, grid: bool = False, interval: int = 1, device: torch.device | None = None
) -> WindowLayout:
    """Return the layout of windows of side `size` in which padding is masked out of attention.

    Args:
        height, width: of the map, tokens.
        size: side of a window, tokens.
        grid: whether a window holds tokens spread evenly over the whole (padded) map, `size` per side, instead of neighbours: MaxViT's
            grid attention.
        interval: distance between adjacent tokens of a window unless `grid`: 1 for neighbours, more for CrossFormer's long distances.
    """
    step = 1 if grid else interval
    padded = (height + -height % (size * step), width + -width % (size * step))
    steps = (padded[0] // size, padded[1] // size) if grid else (step, step)
    places = torch.arange(padded[0] * padded[1], device=device).view(padded)
    hidden = torch.ones(padded, dtype=torch.long, device=device)
    hidden[:height, :width] = 0
    order = _apart(places, size, steps)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
    if padded == (height, width):
        return WindowLayout(order, inverse, None, None, size, -math.inf)
    region = _apart(hidden, size, steps)
    return WindowLayout(order, inverse, region[:, None] == 0, region.view(-1, size * size), size, -math.inf)


def _apart(grid: Tensor, size: int, steps: tuple[int, int]) -> Tensor:
    """Order tokens (H', W') so that those `steps` rows and columns apart are adjacent, `size` per side: (H' * W',)."""
    height, width = (side // (size * step) for side, step in zip(grid.shape, steps, strict=True))
    return grid.view(height, size, steps[0], width, size, steps[1]).permute(0, 2, 3, 5, 1, 4).flatten()


def _in_windows(grid: Tensor, size: int) -> Tensor:
    """Flatten (H', W') in window order: (H' * W',)."""
    return window_partition(grid[None, :, :, None], size).flatten()


def relative_position_index(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the row, in a table of (2 height - 1) * (2 width - 1) offsets, of each query i and key j of a window: query minus key.

    Returns (height * width, height * width) int64.
    """
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)
