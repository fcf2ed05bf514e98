"""Position encodings: relative position biases, sine-cosine tables, rotary tables, and their resizing to other grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.ops.windows import relative_position_index

Grid = tuple[int, int]


@dataclass(frozen=True)
class Resampling:
    """Rule by which a table with one row per cell of a grid is resampled to another grid.

    Args:
        mode: "bicubic", "bilinear" or "nearest", as for `torch.nn.functional.interpolate`.
        antialias: widen the kernel when the grid shrinks. PyTorch's bicubic kernel also has another shape with it (a = -0.5 in place of
            -0.75), so that larger grids differ, too.
        align_corners: map the centres of the corner cells onto each other, instead of the corners of the tables.
        dtype: dtype of the computation; None: that of the table.
        offset: None: the scale follows from the two sizes. A number: the scale is (new + offset) / old, as in DINO, whose offset of 0.1
            keeps the output's size safe from rounding and moves all sampling points.
    """

    mode: str = "bicubic"
    antialias: bool = False
    align_corners: bool = False
    dtype: torch.dtype | None = None
    offset: float | None = None

    def __call__(self, image: Tensor, size: Grid) -> Tensor:
        """Resample images (B, C, H, W) to `size`: (B, C, *size), in the dtype of `image`.

        Raises:
            ValueError: the scale with the offset gives another size.
        """
        corners = None if self.mode == "nearest" else self.align_corners
        options: dict[str, Any] = dict(mode=self.mode, antialias=self.antialias, align_corners=corners)
        x = image if self.dtype is None else image.to(self.dtype)
        if self.offset is None:
            return F.interpolate(x, size=size, **options).to(image.dtype)
        scale = [(new + self.offset) / old for new, old in zip(size, image.shape[-2:], strict=True)]
        x = F.interpolate(x, scale_factor=scale, recompute_scale_factor=False, **options)
        if tuple(x.shape[-2:]) != tuple(size):
            raise ValueError(
                f"an offset of {self.offset} gives a grid of {tuple(x.shape[-2:])} in place of {tuple(size)}; take 0 <= offset < 1"
            )
        return x.to(image.dtype)


PLAIN = Resampling()
"""Plain bicubic in the table's dtype: DeiT, MAE, EViT, T2T-ViT, Vim, Swin and the many systems that took it from them."""
BILINEAR = Resampling(mode="bilinear")
TIMM = Resampling(antialias=True, dtype=torch.float32)
"""Rule of timm's own models: bicubic with antialiasing, in float32."""
DINO = Resampling(offset=0.1)
"""Rule of DINO: plain bicubic by the scale (new + 0.1) / old."""
DINOV2 = Resampling(offset=0.1, dtype=torch.float32)
"""Rule of DINOv2: DINO's in float32."""


class EvalCache(nn.Module):
    """Cache of values that a module derives from its parameters, in evaluation mode and without gradients.

    A value is invalidated by a change of a parameter in place (load_state_dict, weight averaging) or of its storage (`.to(...)`), and by
    every `train()` and `eval()`, since fused optimizers change parameters without a version bump. It is a module so that these calls reach
    it. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[Any, tuple[Any, Any]] = {}

    def train(self, mode: bool = True) -> EvalCache:
        """Clear the cache, whatever the mode."""
        self._values.clear()
        return super().train(mode)

    def get(self, module: nn.Module, key: Any, source: Tensor | nn.Module, build: Callable[[], Any]) -> Any:
        """Return `build()`, cached under `key` as long as `source`, the parameter or module that it derives from, stays the same.

        Args:
            module: owner of the cache; in training mode nothing is cached.
        """
        if module.training or torch.compiler.is_compiling():
            self._values.clear()
            return build()
        sources = tuple(source.parameters()) if isinstance(source, nn.Module) else (source,)
        if any(t.is_inference() or (t.requires_grad and torch.is_grad_enabled()) for t in sources):
            self._values.clear()
            return build()
        stamp = tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in sources)
        kept = self._values.get(key)
        if kept is None or kept[0] != stamp:
            if len(self._values) >= 16:  # bounds the memory when many image sizes alternate
                self._values.clear()
            with torch.inference_mode(False), torch.no_grad():  # autograd cannot use inference tensors later
                kept = self._values[key] = (stamp, build())
        return kept[1]

    def for_grid(self, module: nn.Module, table: Tensor, old: Grid, new: Grid, *, prefix: int = 0, rule: Resampling = PLAIN) -> Tensor:
        """Return a position table resized to the grid `new`, or unchanged if `new` equals `old`. See `resize_position_table`."""
        return (
            table if new == old else self.get(module, new, table, lambda: resize_position_table(table, old, new, prefix=prefix, rule=rule))
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": {}}


class RelativePositionBias(nn.Module):
    """Learned relative position bias of square windows, one value per head and offset: (heads, n, n), query by key.

    Args:
        window_size: side M of the window, tokens; n = M * M.
        num_heads: number of heads.

    Source: Swin (query minus key, row-major inside the window).
    """

    index: Tensor

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("index", relative_position_index(window_size, window_size), persistent=False)
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, size: int | None = None) -> Tensor:
        """Return the biases (heads, n, n).

        Args:
            size: side of the window; must equal window_size.

        Raises:
            ValueError: another size.
        """
        if size not in (None, self.window_size):
            raise ValueError(f"this bias table is for windows of side {self.window_size}, got {size}")
        n = self.index.shape[0]
        return self.table[self.index.flatten()].view(n, n, -1).permute(2, 0, 1)


def resize_bias_table(table: Tensor, rows: int, *, rule: Resampling = PLAIN) -> Tensor:
    """Resize the relative position bias table of a square window to another window size: ((2M - 1)^2, heads) -> (rows, heads).

    Source: the checkpoint loading code of Swin (bicubic) and of MaxViT (bilinear), without aligned corners.

    Raises:
        ValueError: the number of rows of either table is not a square.
    """
    sides = [round(n**0.5) for n in (table.shape[0], rows)]
    if sides[0] ** 2 != table.shape[0] or sides[1] ** 2 != rows:
        raise ValueError(f"bias tables of square windows have a square number of rows, got {table.shape[0]} -> {rows}")
    image = table.T.reshape(1, -1, sides[0], sides[0])
    return rule(image, (sides[1], sides[1])).flatten(2)[0].T


def sincos_2d(dim: int, height: int, width: int, *, temperature: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Return the fixed sine-cosine position table of a token grid, (height * width, dim), float32.

    The first half of the channels encodes the column, the second the row, as in MAE. Each half is [sin, cos] of
    position * temperature^(-i / (dim / 4)), i = 0 .. dim / 4 - 1, computed in float64.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs dim divisible by 4, got {dim}; try {dim + -dim % 4}")
    rate = temperature ** (-torch.arange(dim // 4, device=device, dtype=torch.float64) / (dim // 4))
    row, column = (torch.arange(side, device=device, dtype=torch.float64)[:, None] * rate for side in (height, width))
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(height, width, -1)
    column = torch.cat([column.sin(), column.cos()], 1)[None].expand(height, width, -1)
    return torch.cat([column, row], 2).flatten(0, 1).float()


def rotary_2d(
    head_dim: int,
    height: int,
    width: int,
    *,
    temperature: float = 10000.0,
    span: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the rotary table of a token grid for `apply_rotary`, (2, height * width, head_dim): cosines, then sines.

    The first half of the channels of a head rotates with the row, the second with the column; channels 2i and 2i + 1 form a pair.

    Args:
        span: rows and columns are scaled to positions below `span`, whatever the grid (as in EVA-02 and Vim); None: one unit each.

    Raises:
        ValueError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need head_dim divisible by 4, got {head_dim}")
    rate = temperature ** (-torch.arange(head_dim // 4, device=device, dtype=torch.float64) / (head_dim // 4))
    scales = [1.0 if span is None else span / side for side in (height, width)]
    lines = [torch.arange(side, device=device, dtype=torch.float64) * scale for side, scale in zip((height, width), scales, strict=True)]
    row, column = (line[:, None] * rate for line in lines)
    angle = torch.cat([row[:, None].expand(height, width, -1), column[None].expand(height, width, -1)], 2).flatten(0, 1)
    angle = angle.repeat_interleave(2, dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair of channels of queries or keys by the angle of its token: (B, heads, N, d), (2, N, d) -> (B, heads, N, d)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    cos, sin = table.to(x.dtype)
    return x * cos + turned * sin


def resize_position_table(table: Tensor, old: Grid, new: Grid, *, prefix: int = 0, rule: Resampling = PLAIN) -> Tensor:
    """Resize a learned position table to another grid: (1, prefix + h w, C) -> (1, prefix + h' w', C), in the table's dtype.

    Args:
        table: one row per token; the first `prefix` rows belong to class or register tokens and are kept.
        old, new: height and width of the grids, tokens.
        rule: how the grid is resampled; the plain bicubic rule of most systems, or another that the authors of a system use.
    """
    fixed, grid = table[:, :prefix], table[:, prefix:]
    image = rule(grid.reshape(1, *old, -1).permute(0, 3, 1, 2), new)
    return torch.cat([fixed, image.flatten(2).transpose(1, 2)], 1)


def fit_position_table(table: Tensor, shape: torch.Size, new: Grid, *, prefix: int = 0, rule: Resampling = PLAIN) -> Tensor | None:
    """Resize the position table of a checkpoint, of a square grid, to the grid of a model; return None if it is no such table.

    Args:
        table: the table of the checkpoint.
        shape: shape of the table of the model.
        new: height and width of the grid of the model, tokens.
        prefix: number of class or register tokens.
        rule: how the grid is resampled.
    """
    side = math.isqrt(max(0, table.shape[1] - prefix)) if table.ndim == 3 else 0
    if table.shape[2:] != shape[2:] or side**2 + prefix != table.shape[1]:
        return None
    return resize_position_table(table, (side, side), new, prefix=prefix, rule=rule)
