"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", 2021), in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitarium.nn.layers import Linear
from vitarium.ops.deformable import deformable_attention


class DeformableAttention(nn.Module):
    """Attention from each query to a few sampled points of several maps around its reference: (B, Q, dim) -> (B, Q, dim).

    Parameter names are those of the authors' MSDeformAttn, so that its checkpoints load.

    Args:
        dim: channels of queries and map cells.
        num_levels: number of maps L.
        num_heads: heads h; initially each one samples in its own direction.
        num_points: sampled points P per head and map.

    Raises:
        ValueError: dim is not a multiple of num_heads.
    """

    def __init__(self, dim: int, num_levels: int = 4, num_heads: int = 8, num_points: int = 4):
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        super().__init__()
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the sampled points on rays from the reference, one ray per head, point p at p steps, with equal weights."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = rays[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for weight in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]], padding: Tensor | None = None
    ) -> Tensor:
        """Attend from queries to sampled points of the maps.

        Args:
            query: (B, Q, dim).
            reference: (B, Q, L, 2) for points x, y, or (B, Q, L, 4) for boxes x, y, width, height; relative to the padded maps, 0 to 1.
            value: (B, N, dim), the cells of all maps, one map after the other, row by row.
            shapes: height and width of each map.
            padding: bool (B, N), True where a cell is padding; it counts as zero.

        Raises:
            ValueError: references with other than 2 or 4 numbers, or shapes that do not add up to N cells.
        """
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        cells = self.value_proj(value)
        if padding is not None:
            cells = cells.masked_fill(padding[..., None], 0)
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1).unflatten(-1, (levels, points))
        around = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            places = around + offsets / offsets.new_tensor([(w, h) for h, w in shapes])[:, None]
        elif reference.shape[-1] == 4:
            places = around[..., :2] + offsets / points * around[..., 2:] * 0.5
        else:
            raise ValueError(f"a reference has 2 numbers (x, y) or 4 (x, y, w, h), got {reference.shape[-1]}")
        return self.output_proj(deformable_attention(cells.unflatten(-1, (heads, -1)), shapes, places, weights))
