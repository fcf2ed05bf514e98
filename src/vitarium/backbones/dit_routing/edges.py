"""Edges of the routing grid and their gates, each computed either for all tokens with a mask or for gathered tokens.

Legend: as in the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import DropPath, LayoutCache, Linear
from vitarium.nn.pvt import GridMlp, OverlapPatchEmbed, ReducedAttention
from vitarium.ops.maps import as_map, as_tokens

Grid = tuple[int, int]
Taken = Tensor | bool
"""Selection of the tokens of an edge: (B, N, 1), bool in inference, 0 and 1 with a gradient in training; True for all, False for none."""


class Gate(nn.Module):
    """Gate of an edge: normed tokens (B, N, C) -> logits (B, N, 2) for skipping and for taking the edge. Initialised to take it."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = Linear(dim, max(1, dim // 4))
        self.fc2 = Linear(max(1, dim // 4), 2)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(y)))


class FixedGate(nn.Module):
    """Constant replacement for a gate: all tokens take the edge, or none."""

    def __init__(self, on: bool):
        super().__init__()
        self.on = on

    def extra_repr(self) -> str:
        return f"on={self.on}"


def sample_gate(logits: Tensor, temperature: Tensor) -> Tensor:
    """Sample gates from logits by a straight-through Gumbel-softmax: (B, N, 2) -> (B, N, 1), 0 or 1 with the gradient of the soft value."""
    noise = -torch.empty_like(logits).exponential_().clamp(min=torch.finfo(logits.dtype).tiny).log()
    soft = ((logits + noise) / temperature.to(logits.dtype)).softmax(-1)[..., 1:]
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def gathers(x: Tensor, taken: Taken) -> bool:
    """Return whether to gather the selected tokens; training and graphs with static shapes use masks instead."""
    if isinstance(taken, bool) or taken.dtype is not torch.bool or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not x.is_meta


@dataclass(frozen=True, eq=False)
class Chosen:
    """Indices of the T selected tokens in a batch of maps with at least one each and at most M.

    Attributes:
        index: (T,) int64, indices of the tokens in (B N).
        near: (T',) int64, indices of the tokens and their 3 x 3 neighbours.
        place: (T,) int64, index of each token in a padded batch (B, M).
        batch, most: B and M.
    """

    index: Tensor
    near: Tensor
    place: Tensor
    batch: int
    most: int

    @classmethod
    def of(cls, taken: Tensor, grid: Grid) -> Chosen:
        """Build the indices from a selection (B, N, 1) bool."""
        flags = taken[..., 0]
        index = flags.flatten().nonzero()[:, 0]
        near = spread_over(flags.unflatten(1, grid), 1).flatten().nonzero()[:, 0]
        rank = flags.long().cumsum(1)
        most = int(rank[:, -1].max())
        place = (rank - 1 + most * torch.arange(len(flags), device=flags.device)[:, None]).flatten()[index]
        return cls(index, near, place, len(flags), most)

    def padded(self, rows: Tensor) -> Tensor:
        """Arrange selected rows (T, C) as a batch (B, M, C), padded with zeros."""
        blank = rows.new_zeros(self.batch * self.most, rows.shape[1])
        return blank.index_copy_(0, self.place, rows).view(self.batch, self.most, rows.shape[1])


class SpatialReductionAttention(ReducedAttention):
    """PVTv2's attention to a map that is R times coarser: (B, N, dim) of a grid -> the same shape.

    Args:
        dim, num_heads: channels and heads.
        sr_ratio: R; a remainder of the map is dropped, as in PVTv2, and a map smaller than R is padded with zeros.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int):
        super().__init__(dim, num_heads)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        if self.sr_ratio == 1:
            return x
        image, missing = as_map(x, grid), [max(0, self.sr_ratio - side) for side in grid]
        return self.norm(as_tokens(self.sr(F.pad(image, (0, missing[1], 0, missing[0])) if any(missing) else image)))

    def keys(self, grid: Grid) -> int:
        """Return the number of keys of a grid."""
        return max(1, grid[0] // self.sr_ratio) * max(1, grid[1] // self.sr_ratio)


class RoutedBlock(nn.Module):
    """PVTv2 block that updates selected tokens and reads all tokens: (B, N, dim) of a grid -> the same shape."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = GridMlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        """Apply the block; `mask` (B, N, 1) is 1 for tokens that are updated, None for all."""
        for branch, norm in ((self.attn, self.norm1), (self.mlp, self.norm2)):
            change = self.drop_path(branch(norm(x), grid))
            x = x + (change if mask is None else mask * change)
        return x

    def gathered(self, x: Tensor, grid: Grid, chosen: Chosen) -> Tensor:
        """Apply the block in evaluation mode without computing what only unselected tokens need."""
        y, flat = self.norm1(x), x.flatten(0, 1)
        q = self.attn.q(y.flatten(0, 1).index_select(0, chosen.index))
        a = self.attn.attend(chosen.padded(q), y, grid).flatten(0, 1).index_select(0, chosen.place)
        mine = flat.index_select(0, chosen.index) + self.attn.proj(a)
        flat = flat.index_copy(0, chosen.index, mine)
        hidden = self.hidden(flat, chosen.near, len(x), grid).flatten(0, 1).index_select(0, chosen.index)
        return flat.index_copy_(0, chosen.index, mine + self.mlp.fc2(F.gelu(hidden))).view(x.shape)

    def hidden(self, flat: Tensor, near: Tensor, batch: int, grid: Grid) -> Tensor:
        """Compute the MLP up to its depth-wise convolution, correct where all neighbours are in `near`: (B N, dim) -> (B, N, hidden)."""
        if len(near) == len(flat):
            image = self.mlp.fc1(self.norm2(flat))
        else:
            some = self.mlp.fc1(self.norm2(flat.index_select(0, near)))
            image = some.new_zeros(len(flat), some.shape[1]).index_copy_(0, near, some)
        return as_tokens(self.mlp.dwconv(as_map(image.view(batch, len(flat) // batch, image.shape[1]), grid)))

    def macs(self, grid: Grid) -> tuple[int, int, int]:
        """Return the multiply-accumulates per selected token, per selected or neighbouring token, and per image with a selected token."""
        attn, (hidden, dim) = self.attn, self.mlp.fc1.weight.shape
        keys = attn.keys(grid)
        once = 2 * dim * dim * keys + 9 * hidden * grid[0] * grid[1] + (dim * dim * attn.sr_ratio**2 * keys if attn.sr_ratio > 1 else 0)
        return 2 * dim * dim + 2 * dim * keys + hidden * dim, hidden * dim, once


class RowEdge(nn.Module):
    """Blocks between two columns, B in the module's docstring: (B, N, dim) of a grid -> the same shape."""

    def __init__(self, blocks: Sequence[RoutedBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, grid: Grid, taken: Taken, run: Callable[..., Tensor]) -> Tensor:
        if taken is False:
            return x
        if taken is True or not gathers(x, taken):
            return run(self.blocks, x, grid, None if taken is True else taken.to(x.dtype))
        if taken.all():
            return run(self.blocks, x, grid, None)
        some = taken.any(1)[:, 0]
        if not some.all():  # skip images without a selected token
            index = some.nonzero()[:, 0]
            return x.index_copy(0, index, self(x.index_select(0, index), grid, taken.index_select(0, index), run)) if len(index) else x
        chosen = Chosen.of(taken, grid)
        for block in self.blocks:
            x = block.gathered(x, grid, chosen)  # type: ignore[operator]
        return x

    def macs(self, grid: Grid) -> tuple[int, int, int]:
        """Return the sums of `RoutedBlock.macs` over the blocks."""
        each = [block.macs(grid) for block in self.blocks]  # type: ignore[operator]
        per_token, per_near, once = (sum(column) for column in zip(*each, strict=True))
        return per_token, per_near, once


class ColumnEdge(OverlapPatchEmbed):
    """Downsampling to the next scale, P in the module's docstring: normed tokens (B, N, in_dim) -> (B, N', dim) of half the grid."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(in_dim, dim)
        self.kept = LayoutCache()

    def forward(self, y: Tensor, grid: Grid, taken: Taken) -> Tensor | None:  # type: ignore[override]
        """Downsample the selected tokens; return None if a fixed gate selects none."""
        if taken is False:
            return None
        if taken is True:
            return self.dense(y, grid)
        cells = fed(taken.unflatten(1, grid)[..., 0])  # (B, h', w')
        y = y * taken
        if not gathers(y, taken):
            return self.dense(y, grid) * cells.flatten(1)[..., None].to(y.dtype)
        return self.dense(y, grid) if cells.all() else self.gathered(y, grid, cells)

    def dense(self, y: Tensor, grid: Grid) -> Tensor:
        return super().forward(as_map(y, grid)).flatten(1, 2)

    def gathered(self, y: Tensor, grid: Grid, cells: Tensor) -> Tensor:
        """Compute only the cells (B, h', w') with a selected input; the tokens of the others are zero."""
        (batch, count, dim), (out, _, _, _) = y.shape, self.proj.weight.shape
        table = self.kept.get(*grid, y.device, lambda: inputs_of_cells(grid, y.device))
        index = cells.flatten().nonzero()[:, 0]
        take = table[index % len(table)] + (count + 1) * (index // len(table))[:, None]
        rows = F.pad(y, (0, 0, 0, 1)).flatten(0, 1).index_select(0, take.flatten()).view(len(index), 9 * dim)
        weight = self.proj.weight.permute(0, 2, 3, 1).reshape(out, 9 * dim)
        tokens = self.norm(F.linear(rows, weight, self.proj.bias))
        blank = tokens.new_zeros(batch * len(table), out)
        return blank.index_copy_(0, index, tokens).view(batch, len(table), out)

    def macs(self) -> int:
        """Return the multiply-accumulates per computed cell."""
        return self.proj.weight.numel()


def fed(taken: Tensor) -> Tensor:
    """Return the cells of a strided 3 x 3 convolution with a selected input: (B, h, w) -> (B, ceil(h / 2), ceil(w / 2)), bool for bool."""
    cells = spread_over(taken.detach(), 2)
    return cells > 0 if taken.dtype is torch.bool else cells


def spread_over(taken: Tensor, stride: int) -> Tensor:
    """Return the cells of a 3 x 3 convolution with a selected input: (B, h, w) -> (B, ceil(h / stride), ceil(w / stride)) float, 0 or 1."""
    return F.max_pool2d(taken[:, None].float(), 3, stride, 1)[:, 0]


def inputs_of_cells(grid: Grid, device: torch.device) -> Tensor:
    """Return the indices of the nine inputs of each cell of a 3 x 3 convolution of stride 2: (N', 9) int64; N outside the map."""
    height, width = grid
    rows, columns = (
        2 * torch.arange((side + 1) // 2, device=device)[:, None] + torch.arange(-1, 2, device=device) for side in (height, width)
    )
    places = rows[:, None, :, None] * width + columns[None, :, None, :]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    return torch.where(inside, places, height * width).flatten(0, 1).flatten(1)
