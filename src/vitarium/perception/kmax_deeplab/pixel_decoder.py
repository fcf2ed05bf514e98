"""Pixel decoder: computes the maps for clustering from a backbone's maps, by axial attention at coarse and bottlenecks at fine
resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import InputError
from vitarium.nn import LayerNorm2d
from vitarium.perception.kmax_deeplab.parts import ConvNorm, batch_norm, resize, truncated_normal

MAX_SPAN = 255
"""Largest length of an axis in cells: the tables hold one row for each distance from -254 to 254."""


class RelativeEmbedding(nn.Module):
    """Table of a vector for each distance between two cells: length l -> (l, l, dim), row by the query's position, column by the key's."""

    def __init__(self, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(2 * MAX_SPAN - 1, dim))
        truncated_normal(self.table, 1.0)

    def forward(self, length: int) -> Tensor:
        place = torch.arange(length, device=self.table.device)
        return self.table[place[None, :] - place[:, None] + MAX_SPAN - 1]


class AxialAttention(nn.Module):
    """Attention along one axis with positions in queries, keys and values: (N, in_dim, l) -> (N, value_dim, l).

    similarity = BN([q.k ; q.r^q ; k.r^k]), summed; the batch norm replaces 1 / sqrt(d)
    output     = BN([sum_m w v ; sum_m w r^v]), summed

    Args:
        in_dim: channels of the input.
        key_dim, value_dim: channels of queries and keys, and of values, over all heads.
        num_heads: heads h.
    """

    def __init__(self, in_dim: int, key_dim: int, value_dim: int, num_heads: int, momentum: float):
        super().__init__()
        self.num_heads, self.split = num_heads, (key_dim, key_dim, value_dim)
        self.qkv = nn.Conv1d(in_dim, sum(self.split), 1, bias=False)
        truncated_normal(self.qkv.weight, in_dim**-0.5)
        self.qkv_norm = batch_norm(sum(self.split), 1, momentum)
        self.query_position = RelativeEmbedding(key_dim // num_heads)
        self.key_position = RelativeEmbedding(key_dim // num_heads)
        self.value_position = RelativeEmbedding(value_dim // num_heads)
        self.similarity_norm = batch_norm(3 * num_heads, 2, momentum)
        self.output_norm = batch_norm(2 * value_dim, 1, momentum)

    def forward(self, x: Tensor) -> Tensor:
        length, heads = x.shape[-1], self.num_heads
        q, k, v = (part.unflatten(1, (heads, -1)) for part in self.qkv_norm(self.qkv(x)).split(self.split, 1))  # (N, h, d, l)
        similarity = torch.cat(
            [
                q.transpose(-1, -2) @ k,
                torch.einsum("nhdl,lmd->nhlm", q, self.query_position(length)),
                torch.einsum("nhdm,lmd->nhlm", k, self.key_position(length)),
            ],
            1,
        )
        weights = self.similarity_norm(similarity).unflatten(1, (3, heads)).sum(1).softmax(-1)
        content = v @ weights.transpose(-1, -2)
        position = torch.einsum("nhlm,lmd->nhdl", weights, self.value_position(length))
        return self.output_norm(torch.cat([content, position], 1).flatten(1, 2)).unflatten(1, (2, -1)).sum(1)


class AxialAttention2d(nn.Module):
    """Axial attention along the height, then along the width: (B, C, H, W) -> (B, value_dim, H, W).

    Raises:
        InputError: an axis has more than 255 cells, the limit of the tables of distances.
    """

    def __init__(self, in_dim: int, key_dim: int, value_dim: int, num_heads: int, momentum: float):
        super().__init__()
        self.height = AxialAttention(in_dim, key_dim, value_dim, num_heads, momentum)
        self.width = AxialAttention(value_dim, key_dim, value_dim, num_heads, momentum)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if max(h, w) > MAX_SPAN:
            raise InputError(f"axial attention takes at most {MAX_SPAN} cells per axis, the map has {h} x {w}; make the image smaller")
        x = self.height(x.permute(0, 3, 1, 2).flatten(0, 1))  # (B W, C, H)
        x = x.unflatten(0, (b, w)).permute(0, 3, 2, 1).flatten(0, 1)  # (B H, C, W)
        return self.width(x).unflatten(0, (b, h)).transpose(1, 2)


class Block(nn.Module):
    """Residual block, x <- shortcut(GELU(x)) + expand(mix(reduce(GELU(x)))): (B, in_dim, H, W) -> (B, 4 dim, H, W).

    Args:
        dim: base width; a quarter of the output channels.
        axial: whether to mix by axial attention (2 dim channels) or by a 3 x 3 convolution (dim channels).
    """

    def __init__(self, in_dim: int, dim: int, *, axial: bool, num_heads: int, momentum: float):
        super().__init__()
        inner = 2 * dim if axial else dim
        self.reduce = ConvNorm(in_dim, inner, act=True, momentum=momentum)
        self.mix: nn.Module
        if axial:
            self.mix = nn.Sequential(AxialAttention2d(inner, dim, 2 * dim, num_heads, momentum), nn.GELU())
        else:
            self.mix = ConvNorm(inner, dim, 3, act=True, momentum=momentum)
        self.expand = ConvNorm(inner, 4 * dim, momentum=momentum, gain=0.0)
        self.shortcut = ConvNorm(in_dim, 4 * dim, momentum=momentum) if in_dim != 4 * dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        return self.expand(self.mix(self.reduce(x))) + self.shortcut(x)


class Fuse(nn.Module):
    """Fusion of a coarse map (B, low_dim, h, w) and a finer one (B, high_dim, H, W): their sum (B, dim, H, W)."""

    def __init__(self, low_dim: int, high_dim: int, dim: int, momentum: float):
        super().__init__()
        self.low = nn.Sequential(nn.GELU(), ConvNorm(low_dim, dim, momentum=momentum)) if low_dim != dim else nn.Identity()
        self.high = nn.Sequential(nn.GELU(), ConvNorm(high_dim, dim, momentum=momentum)) if high_dim != dim else nn.Identity()

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return resize(self.low(low), high.shape[-2:]) + self.high(high)


class PixelDecoder(nn.Module):
    """Pixel decoder: maps from fine to coarse (strides 4, 8, 16, 32) -> as many from coarse to fine, (B, 4 dims[i], H_i, W_i).

    Args:
        in_dims: channels of the backbone's maps, from fine to coarse.
        depths, dims: blocks and base width per stage, from coarse to fine; the first two stages use axial attention.
    """

    def __init__(self, in_dims: Sequence[int], depths: Sequence[int], dims: Sequence[int], num_heads: int, momentum: float):
        super().__init__()
        coarse_first = list(in_dims)[::-1]
        self.in_norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6) for dim in coarse_first)
        self.fuses = nn.ModuleList(
            Fuse(4 * dims[i - 1], coarse_first[i], dims[i], momentum) if i else nn.Identity() for i in range(len(dims))
        )
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            entries = [coarse_first[0] if i == 0 else dim, *[4 * dim] * (depth - 1)]
            self.stages.append(nn.Sequential(*(Block(e, dim, axial=i < 2, num_heads=num_heads, momentum=momentum) for e in entries)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for norm, fuse, stage, x in zip(self.in_norms, self.fuses, self.stages, reversed(maps), strict=True):
            x = norm(x)
            found.append(stage(fuse(found[-1], x) if found else x))
        return found
