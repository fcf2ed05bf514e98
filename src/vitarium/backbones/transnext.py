"""TransNeXt: a joint softmax over a fine neighbourhood and a coarse global map (Shi, "TransNeXt", 2024).

The idea: foveal vision. In one softmax, each query attends to its 3 x 3 neighbourhood at full resolution and to a pooled grid of the whole
map (aggregated attention). The MLP is a gated linear unit whose gate passes a depth-wise convolution.

    Q = (q / |q| + QE) tau log(number of keys);  weights = softmax([Q k / |k| + b_local | Q k_pool / |k_pool| + MLP(offset)])
    out = sum of weights v  +  sum over neighbours of (q / |q| . T_j + b_j) v_j,  the second with learned keys T and after the softmax
    x <- x + Attention(LN(x));  x <- x + W (GELU(DW_3x3(g)) * v), [g | v] = W' LN(x)

The last stage uses full attention with the same queries. The scaling by the logarithm of the number of keys and the position bias as a
function of distance let the model generalise to other image sizes.
Follows the authors' code (github DaiShiResearch/TransNeXt, native attention); its checkpoints load by name: classifiers, and detectors and
segmenters (only the backbone is read; `bias_size`). Distances and logarithms are computed in float32, as there. Any image size.
Left out: dropout of the attention weights, which no config uses; the epsilon of the norms, which is 1e-6 in all released models.
Cost: quadratic in area, 1/64 of full attention; linear with `fixed_pool_size`.

Speed: the neighbours are shifted views of one padded map instead of copies; position biases are computed once per size in
evaluation mode, from a table with one row per distinct distance.

Legend: B batch, C channels, H W map, N = H W tokens, h heads, d channels per head, P tokens of the pooled grid, K side of neighbourhoods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import chain, family, part_of, rename
from vitarium.nn import (
    Backbone,
    DropPath,
    EvalCache,
    Linear,
    Mlp,
    Stage,
    drop_path_rates,
    init_convs_by_fan_out,
    init_weights,
    per_stage,
)
from vitarium.nn.pvt import OverlapPatchEmbed, pvt_rules
from vitarium.ops.attention import merge_heads, split_heads, split_packed_heads
from vitarium.ops.maps import as_tokens

PATHS = ("local", "pooled")
Grid = tuple[int, int]
HEAD_DIM = 24
"""Channels per head of the released models."""


def neighbours(window_size: int) -> list[tuple[int, int]]:
    """Return the rows and columns of a K x K neighbourhood, row by row."""
    return [(row, column) for row in range(window_size) for column in range(window_size)]


def distances(count: int, pooled: int) -> tuple[list[float], list[list[int]]]:
    """Return the distances from each of `count` positions to the centre of each of `pooled` cells of their adaptive average pooling.

    Returns:
        the distinct distances in ascending order, and their index for each position and cell.
    """
    twice = [j * count // pooled - (-(j + 1) * count // pooled) - 1 for j in range(pooled)]  # first + last position of a cell
    pairs = [[2 * i - middle for middle in twice] for i in range(count)]
    kinds = sorted({pair for row in pairs for pair in row})
    number = {kind: n for n, kind in enumerate(kinds)}
    return [kind / 2 for kind in kinds], [[number[pair] for pair in row] for row in pairs]


def scaled(distance: Tensor, pretrain_side: int) -> Tensor:
    """Return the input of the position MLP for distances in tokens: sign(d) log2(|d| + 1) / 3, where d = 8 spans the pretraining map."""
    distance = distance / (pretrain_side - 1) * 8
    return distance.sign() * (distance.abs() + 1).log2() / 3


def inside_counts(height: int, width: int, device: torch.device | None = None, *, window_size: int = 3) -> Tensor:
    """Return the number of K x K neighbours inside the map for each token: (N,) float32; for K = 3: 9 inside, 6 at edges, 4 at corners."""
    size = window_size
    rows, columns = (F.avg_pool1d(torch.ones(1, 1, n, device=device), size, 1, size // 2)[0, 0].mul(size).round() for n in (height, width))
    return (rows[:, None] * columns).flatten()


def outside(height: int, width: int, device: torch.device | None = None, *, window_size: int = 3) -> Tensor:
    """Return a mask of the K x K neighbours of each token that lie outside the map: (N, K * K) bool."""
    on_map = F.pad(torch.ones(height, width, device=device), (window_size // 2,) * 4)
    views = [on_map[row : row + height, column : column + width] == 0 for row, column in neighbours(window_size)]
    return torch.stack(views, -1).flatten(0, 1)


class DistancePositionBias(nn.Module):
    """Position bias between tokens and cells of the pooled grid, computed by an MLP from their distance: (h, N, P)."""

    def __init__(self, num_heads: int, pretrain_side: int, hidden_dim: int = 512):
        super().__init__()
        self.pretrain_side = pretrain_side
        self.cpb_fc1 = nn.Linear(2, hidden_dim)
        self.cpb_fc2 = nn.Linear(hidden_dim, num_heads)

    def coordinates(self, grid: tuple[int, int], pooled: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the inputs of the MLP, (kinds, 2), row distance first, and the index into them for each token and cell, (N, P)."""
        device = self.cpb_fc1.weight.device
        kinds, numbers = zip(*(distances(n, p) for n, p in zip(grid, pooled, strict=True)), strict=True)
        values = [scaled(torch.tensor(k, device=device, dtype=torch.float32), self.pretrain_side) for k in kinds]
        rows, columns = (torch.tensor(n, device=device) for n in numbers)
        kind = rows[:, None, :, None] * len(kinds[1]) + columns[None, :, None, :]
        return torch.cartesian_prod(*values).view(len(kinds[0]) * len(kinds[1]), 2), kind.flatten(2).flatten(0, 1)

    def forward(self, grid: tuple[int, int], pooled: tuple[int, int]) -> Tensor:
        inputs, kind = self.coordinates(grid, pooled)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(inputs.to(self.cpb_fc1.weight.dtype))))
        return table[kind.flatten()].view(*kind.shape, table.shape[1]).permute(2, 0, 1).contiguous()


def interpolated(bias: Tensor, old: tuple[Grid, Grid], new: tuple[Grid, Grid]) -> Tensor:
    """Interpolate position biases bilinearly to other grids of queries and keys: (h, N, P) -> (h, N', P').

    Args:
        bias: of the grids `old`.
        old, new: rows and columns of the queries and of the keys.
    """
    for old_grid, new_grid in zip(reversed(old), reversed(new), strict=True):  # the keys, then the queries
        bias = F.interpolate(bias.unflatten(2, old_grid), new_grid, mode="bilinear").flatten(2).transpose(1, 2)
    return bias


class CosineAttention(nn.Module):
    """Base of both attentions: normalised queries plus an embedding, scaled by a temperature and the logarithm of the number of keys.

    Args:
        dim, num_heads: channels and heads.
        pretrain_side: side of the map of this stage in pretraining, tokens.
        bias_side: side of the map for which the position biases are computed; they are interpolated for others. None: for each map.
        pool_ratio: ratio of the sides of the map to those of the grid of keys.
    """

    def __init__(self, dim: int, num_heads: int, pretrain_side: int, bias_side: int | None = None, pool_ratio: int = 1):
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads))
        self.position_bias = DistancePositionBias(num_heads, pretrain_side)
        sides = None if bias_side is None else (bias_side, max(1, bias_side // pool_ratio))
        self.bias_grids = None if sides is None else ((sides[0], sides[0]), (sides[1], sides[1]))
        self.proj = Linear(dim, dim)
        self.cache = EvalCache()
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def queries(self, unit: Tensor, keys: Tensor) -> Tensor:
        """Return the scaled queries, (B, h, N, d).

        Args:
            unit: normalised queries, (B, h, N, d).
            keys: number of keys of each query, (N,) or (1,) float32.
        """
        return (unit + self.query_embedding) * F.softplus(self.temperature) * keys.log().to(unit.dtype)[:, None]

    def bias(self, grid: tuple[int, int], pooled: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the position biases (h, N, P), cached in evaluation mode."""

        def build() -> Tensor:
            if self.bias_grids is None:
                return self.position_bias(grid, pooled).to(dtype)
            return interpolated(self.position_bias(*self.bias_grids), self.bias_grids, (grid, pooled)).to(dtype).contiguous()

        return self.cache.get(self, (grid, pooled, dtype), self.position_bias, build)


class FullAttention(CosineAttention):
    """Attention between all tokens: (B, H, W, C) -> the same shape."""

    def __init__(self, dim: int, num_heads: int, pretrain_side: int, *, qkv_bias: bool = True, bias_side: int | None = None):
        super().__init__(dim, num_heads, pretrain_side, bias_side)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        q, k, v = split_packed_heads(self.qkv(x.flatten(1, 2)), 3, self.num_heads)
        keys = torch.full((1,), float(grid[0] * grid[1]), device=x.device)
        q = self.queries(F.normalize(q, dim=-1), keys)
        y = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=self.bias(grid, grid, q.dtype), scale=1.0)
        return self.proj(merge_heads(y)).view(x.shape)


class AggregatedAttention(CosineAttention):
    """Aggregated attention to the K x K neighbours and to a pooled grid: (B, H, W, C) -> the same shape.

    Args:
        dim, num_heads: channels and heads.
        pretrain_side: side of the map of this stage in pretraining, tokens.
        pool_ratio: ratio of the sides of the map to those of the pooled grid.
        fixed_pool_size: side of the pooled grid, in place of pool_ratio.
        paths: the keys: "local", "pooled" or both.
        window_size: side K of the neighbourhood, tokens, odd.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        bias_side: see `CosineAttention`.

    Raises:
        ValueError: dim is not divisible by num_heads, or an even window_size.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_side: int,
        pool_ratio: int,
        fixed_pool_size: int | None,
        paths: Sequence[str] = PATHS,
        *,
        window_size: int = 3,
        qkv_bias: bool = True,
        bias_side: int | None = None,
    ):
        if window_size % 2 == 0:
            raise ValueError(f"window_size must be odd, so that a neighbourhood has a centre; got {window_size}, try {window_size + 1}")
        super().__init__(dim, num_heads, pretrain_side, bias_side, pool_ratio)
        self.pool_ratio, self.fixed_pool_size, self.paths = pool_ratio, fixed_pool_size, tuple(paths)
        self.window_size = window_size
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window_size**2))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, window_size**2))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, window_size**2))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def pooled_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the pooled grid of a map."""
        if self.fixed_pool_size is not None:
            return self.fixed_pool_size, self.fixed_pool_size
        return max(1, height // self.pool_ratio), max(1, width // self.pool_ratio)

    def moved(self, x: Tensor) -> list[Tensor]:
        """Return shifted views (B, H, W, h, d) of a map (B, H, W, C), one per neighbour, padded with zeros."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0) + 4 * (self.window_size // 2,)).unflatten(3, (self.num_heads, x.shape[3] // self.num_heads))
        return [x[:, row : row + height, column : column + width] for row, column in neighbours(self.window_size)]

    def neighbour_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the logits (B, h, N, K * K) of queries (B, H, W, h, d) and neighbouring keys (B, H, W, C), -inf outside the map."""
        logits = torch.stack([(q * moved).sum(-1) for moved in self.moved(k)], -1).flatten(1, 2).transpose(1, 2)
        beyond = outside(k.shape[1], k.shape[2], k.device, window_size=self.window_size)
        return (logits + self.relative_pos_bias_local[:, None]).masked_fill(beyond, -math.inf)

    def pooled_keys(self, x: Tensor, pooled: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the normalised keys and the values of the pooled grid, (B, h, P, d) each."""
        coarse = F.adaptive_avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), pooled)
        k, v = self.kv(self.norm(as_tokens(coarse))).chunk(2, 2)
        return F.normalize(split_heads(k, self.num_heads), dim=-1), split_heads(v, self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        per_head = (self.num_heads, dim // self.num_heads)
        pooled = self.pooled_grid(height, width)
        unit = F.normalize(split_heads(self.q(x).flatten(1, 2), self.num_heads), dim=-1)
        seen = torch.zeros(height * width, device=x.device)
        if "local" in self.paths:
            seen = seen + inside_counts(height, width, x.device, window_size=self.window_size)
        if "pooled" in self.paths:
            seen = seen + pooled[0] * pooled[1]
        q = self.queries(unit, seen)
        logits, values = [], []
        if "local" in self.paths:
            k, v = self.kv(x).chunk(2, 3)
            k = F.normalize(k.unflatten(3, per_head), dim=-1).flatten(3)
            logits.append(self.neighbour_logits(q.transpose(1, 2).unflatten(1, (height, width)), k))
        if "pooled" in self.paths:
            k_pool, v_pool = self.pooled_keys(x, pooled)
            logits.append(q @ k_pool.transpose(-1, -2) + self.bias((height, width), pooled, q.dtype))
            values.append(v_pool)
        weights = torch.cat(logits, -1).softmax(-1)
        y = torch.zeros_like(unit).transpose(1, 2).unflatten(1, (height, width))
        if "pooled" in self.paths:
            y = (weights[..., -values[0].shape[2] :] @ values[0]).transpose(1, 2).unflatten(1, (height, width))
        if "local" in self.paths:
            near = weights[..., : self.window_size**2] + unit @ self.learnable_tokens + self.learnable_bias
            near = near.transpose(1, 2).unflatten(1, (height, width))
            for j, moved in enumerate(self.moved(v)):
                y = torch.addcmul(y, near[..., j, None], moved)
        return self.proj(y.flatten(3))


class ConvGLU(nn.Module):
    """Convolutional GLU, a gated linear unit with a depth-wise convolution in the gate: (B, H, W, C) -> the same shape."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, 3)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * value)


class TransNeXtBlock(nn.Module):
    """Pre-norm TransNeXt block: (B, H, W, dim) -> the same shape."""

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TransNeXtStage(nn.Module):
    """TransNeXt stage with a final norm: (B, C_in, H, W) -> (B, C, H', W')."""

    def __init__(self, downsample: OverlapPatchEmbed, blocks: Sequence[nn.Module], dim: int):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        return self.norm(run(self.blocks, self.downsample(x))).permute(0, 3, 1, 2)


OFFICIAL = chain(part_of("backbone."), rename(*pvt_rules(4, (r"attn\.cpb_", "attn.position_bias.cpb_"))))
_FOUR = dict(mlp_ratios=(8, 8, 4, 4), pool_ratios=(8, 4, 2, 1))
_MICRO = dict(dims=(48, 96, 192, 384), depths=(2, 2, 15, 2), drop_path_rate=0.15, **_FOUR)
_SMALL = dict(dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), drop_path_rate=0.45, **_FOUR)
_BASE = dict(dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), drop_path_rate=0.6, **_FOUR)


@family(
    "transnext",
    variants={
        "pico": dict(dims=(24, 48), depths=(2, 2), mlp_ratios=(4, 4), pool_ratios=(4, 1), patch_size=2, pretrain_size=16, image_size=16),
        "micro": _MICRO,  # 12.8 M, 82.5 % top-1
        "tiny": dict(dims=(72, 144, 288, 576), depths=(2, 2, 15, 2), drop_path_rate=0.25, **_FOUR),  # 28.2 M, 84.0 %
        "small": _SMALL,  # 49.7 M, 84.7 %
        "base": _BASE,  # 89.7 M, 84.8 %
        "small_384": dict(**_SMALL, image_size=384),  # 86.0 %
        "base_384": dict(**_BASE, image_size=384),  # 86.2 %
        "micro_aaaa": dict(_MICRO, pool_ratios=(16, 8, 4, 2), pretrain_size=256, image_size=256),  # 13.1 M, 82.6 %
    },
    official=OFFICIAL,
    crop_pct=0.875,
)
class TransNeXt(Backbone):
    """TransNeXt classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    The arguments are over 15 so that the authors' configs can be expressed.

    Args:
        dims: channels per stage.
        depths: blocks per stage.
        num_heads: heads per stage; None: one per 24 channels, as in the released models.
        mlp_ratios: ratio of hidden channels to channels, per stage, of an MLP of the same size as the gated unit.
        pool_ratios: ratio of the sides of the map to those of the pooled grid, per stage; 1: full attention.
        window_size: side of the neighbourhood, tokens, odd, for all stages or per stage (unused by full attention).
        qkv_bias: whether the projections to queries, keys and values have a bias.
        fixed_pool_size: fixed side of the pooled grid, for a cost linear in area (7 for 224 pixels); None: proportional to the map.
        patch_size: stride of the stem, pixels.
        pretrain_size: side of the pretraining images, pixels, the unit of distances; keep it when the model runs at other sizes.
        bias_size: side of the image for which position biases are computed, pixels; for other images they are interpolated bilinearly, as
            by default in the authors' detectors and segmenters (their `img_size`). None: biases are computed for each image.
        paths: keys of aggregated attention, "local", "pooled" or both; a single one for the paper's ablation.
        conv_glu: use the gated unit; False: a plain MLP of the same size, for the paper's ablation.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, both bias_size and fixed_pool_size, channels that are not divisible by the heads, an even
            window_size, or other paths.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        pool_ratios: Sequence[int],
        num_heads: Sequence[int] | None = None,
        window_size: int | Sequence[int] = 3,
        qkv_bias: bool = True,
        fixed_pool_size: int | None = None,
        patch_size: int = 4,
        pretrain_size: int = 224,
        bias_size: int | None = None,
        paths: Sequence[str] = PATHS,
        conv_glu: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(dims) == len(depths) == len(mlp_ratios) == len(pool_ratios):
            given = f"{dims}, {depths}, {mlp_ratios} and {pool_ratios}"
            raise ValueError(f"dims, depths, mlp_ratios and pool_ratios need one value per stage, got {given}")
        if num_heads is None and (wrong := [dim for dim in dims if dim % HEAD_DIM]):
            raise ValueError(f"dims must be multiples of {HEAD_DIM}, the width of a head, unless num_heads is given; got {wrong[0]}")
        heads = per_stage([dim // HEAD_DIM for dim in dims] if num_heads is None else num_heads, len(dims), "num_heads")
        windows = per_stage(window_size, len(dims), "window_size")
        if bias_size is not None and fixed_pool_size is not None:
            raise ValueError(
                "bias_size and fixed_pool_size exclude each other: the authors' interpolated biases have no fixed grid of keys"
            )
        if not paths or not set(paths) <= set(PATHS):
            raise ValueError(f"paths must be among {', '.join(PATHS)}, got {paths}")
        stages = [Stage(dim, patch_size * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        rates = drop_path_rates(drop_path_rate, depths)

        def attention(k: int) -> nn.Module:
            side = max(2, pretrain_size // stages[k].stride)
            options: dict[str, Any] = dict(qkv_bias=qkv_bias, bias_side=bias_size and max(1, bias_size // stages[k].stride))
            if pool_ratios[k] == 1:
                return FullAttention(dims[k], heads[k], side, **options)
            options["window_size"] = windows[k]
            return AggregatedAttention(dims[k], heads[k], side, pool_ratios[k], fixed_pool_size, paths, **options)

        def mlp(k: int) -> nn.Module:
            hidden = mlp_ratios[k] * dims[k]
            return ConvGLU(dims[k], int(2 / 3 * hidden)) if conv_glu else Mlp(dims[k], int(hidden))

        self.stages = nn.ModuleList(
            TransNeXtStage(
                OverlapPatchEmbed(dims[k - 1] if k else in_chans, dims[k], 2 if k else patch_size),
                [TransNeXtBlock(dims[k], attention(k), mlp(k), rate) for rate in rates[k]],
                dims[k],
            )
            for k in range(len(dims))
        )
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)

    def no_weight_decay(self) -> set[str]:
        spared = ("query_embedding", "relative_pos_bias_local", "temperature")
        return {name for name, _ in self.named_parameters() if name.endswith(spared) or ".cpb_" in name}
