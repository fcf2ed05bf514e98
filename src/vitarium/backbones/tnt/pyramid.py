"""PyramidTNT: a convolutional stem for words and sentences, four stages of decreasing resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.backbones.tnt.blocks import EPS, PARTS, GatedMlp, Gather, Grid, Pair
from vitarium.catalog import chain, family, rename
from vitarium.catalog.registry import join
from vitarium.nn import (
    Attention,
    Backbone,
    ConvNorm,
    DropPath,
    EvalCache,
    LayerNorm2d,
    Linear,
    Mlp,
    Stage,
    TransformerBlock,
    drop_path_rates,
    init_weights,
    resize_position_table,
)
from vitarium.nn.pvt import ReducedAttention
from vitarium.ops.maps import as_map, as_tokens
from vitarium.ops.windows import pad_to_multiple

SIDE = 4
"""Words per row of a sentence."""


class StemConv(ConvNorm):
    """Convolution 3 x 3, batch norm, ReLU: (B, in_dim, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride))."""

    names = ("conv", "norm")

    def __init__(self, in_dim: int, dim: int, stride: int):
        super().__init__(in_dim, dim, 3, stride, bias=True, act=nn.ReLU)


class PyramidStem(nn.Module):
    """Stem for images (B, in_chans, H, W): words (B N, 16, c) and sentences (B, N, C), without positions.

    Args:
        patch_size: side of a sentence, pixels, 8 or 4.
    """

    def __init__(self, patch_size: int, in_chans: int, inner_dim: int, dim: int):
        super().__init__()
        self.common = StemConv(in_chans, 2 * inner_dim, patch_size // SIDE)
        self.inner = StemConv(2 * inner_dim, inner_dim, 1)
        widths = (2 * inner_dim, 4 * inner_dim, 8 * inner_dim, dim)
        self.outer = nn.Sequential(*(StemConv(a, b, s) for a, b, s in zip(widths, widths[1:], (2, 2, 1), strict=False)))

    def forward(self, image: Tensor) -> Pair:
        x = self.common(image)
        words = self.inner(x)
        batch, dim, rows, columns = words.shape[0], words.shape[1], words.shape[2] // SIDE, words.shape[3] // SIDE
        words = words.reshape(batch, dim, rows, SIDE, columns, SIDE).permute(0, 2, 4, 3, 5, 1)
        return words.reshape(batch * rows * columns, SIDE**2, dim), as_tokens(self.outer(x))


class SentenceAttention(ReducedAttention):
    """Attention from sentences (B, N, dim) of a grid to their r x r averages, with a bias (1, heads, N, M) per pair."""

    def __init__(self, dim: int, num_heads: int, reduction: int, **options: Any):
        super().__init__(dim, num_heads, **options)
        self.reduction = reduction
        if reduction > 1:
            self.linear = Linear(dim, dim)
            self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        if self.reduction == 1:
            return x
        pooled = F.avg_pool2d(as_map(x, grid), self.reduction, ceil_mode=True)
        return self.norm(self.linear(as_tokens(pooled)))


class PyramidInner(nn.Module):
    """Inner transformer block: words (B N, 16, c) -> the same shape. The norms run over all words of a sentence jointly."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, **options: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(SIDE**2 * dim)
        self.attn = Attention(dim, num_heads, **options)
        self.norm2 = nn.LayerNorm(SIDE**2 * dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, words: Tensor) -> Tensor:
        words = words + self.drop_path(self.attn(self.norm1(words.flatten(1)).view(words.shape)))
        return words + self.drop_path(self.mlp(self.norm2(words.flatten(1)).view(words.shape)))


class PyramidBlock(nn.Module):
    """PyramidTNT block: words (B N, 16, c) and sentences (B, N, C) -> the same shapes; without `inner_heads` the words are not used.

    Args:
        dim, inner_dim, num_heads, inner_heads, mlp_ratio, se: see `PyramidTNT`.
        reduction: side of the averages that the outer attention attends to.
        drop_path: stochastic depth rate of all branches.
        options: qkv_bias and scale of both attentions.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        num_heads: int,
        inner_heads: int | None,
        reduction: int,
        *,
        mlp_ratio: float,
        se: bool,
        drop_path: float,
        **options: Any,
    ):
        super().__init__()
        self.inner = self.gather = None
        if inner_heads is not None:
            self.inner = PyramidInner(inner_dim, inner_heads, mlp_ratio, drop_path, **options)
            self.gather = Gather(SIDE**2 * inner_dim, dim)
        attn = SentenceAttention(dim, num_heads, reduction, **options)
        self.outer = TransformerBlock(dim, num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path, attn=attn, eps=EPS)
        if se:
            self.outer.mlp = GatedMlp(dim, int(mlp_ratio * dim))

    def forward(self, both: Pair, grid: Grid, bias: Tensor) -> Pair:
        words, sentences = both
        if self.inner is not None and self.gather is not None:
            words = self.inner(words)
            sentences = sentences + self.gather(words.reshape(*sentences.shape[:2], words.shape[1] * words.shape[2]))
        return words, self.outer(sentences, grid, bias)


class Merge(nn.Module):
    """Norm and strided 3 x 3 convolution that halve the resolution of words or sentences."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, padding=1)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Downsample sentences: (B, h w, in_dim) -> (B, h' w', dim)."""
        return as_tokens(self.conv(as_map(self.norm(x), grid)))

    def words(self, x: Tensor, grid: Grid) -> Tensor:
        """Downsample words: (B h w, 16, in_dim) -> (B h' w', 16, dim); those of 2 x 2 sentences form a map of 8 x 8."""
        rows, columns = grid
        batch, dim = x.shape[0] // (rows * columns), x.shape[2]
        x = pad_to_multiple(self.norm(x).view(batch, rows, columns, SIDE**2 * dim), 2)
        rows, columns = -(-rows // 2), -(-columns // 2)
        x = x.reshape(batch, rows, 2, columns, 2, SIDE, SIDE, dim).permute(0, 1, 3, 7, 2, 5, 4, 6)
        return as_tokens(self.conv(x.reshape(batch * rows * columns, dim, 2 * SIDE, 2 * SIDE)))


class PyramidTNTStage(nn.Module):
    """PyramidTNT stage: words and sentences of a grid -> words and sentences of the grid of this stage.

    Args:
        blocks: blocks of this stage.
        merges: downsampling of words and of sentences before the blocks; empty in the first stage.
        num_heads, reduction: of the outer attention.
        table_grid: the grid that the bias table is made for.
    """

    def __init__(self, blocks: Sequence[nn.Module], merges: Sequence[nn.Module], num_heads: int, reduction: int, table_grid: Grid):
        super().__init__()
        self.downsample = nn.ModuleList(merges)
        self.blocks = nn.ModuleList(blocks)
        self.reduction, self.table_grid = reduction, table_grid
        self.relative_pos = nn.Parameter(torch.randn(1, num_heads, math.prod(table_grid), math.prod(self.reduced(table_grid))))
        self.cache = EvalCache()

    def reduced(self, grid: Grid) -> Grid:
        return -(-grid[0] // self.reduction), -(-grid[1] // self.reduction)

    def bias(self, grid: Grid) -> Tensor:
        """Return the bias table of a grid, (1, heads, N, M), resampled over both axes unless the model was made for this grid."""
        if grid == self.table_grid:
            return self.relative_pos
        return self.cache.get(self, grid, self.relative_pos, lambda: self._resized(grid))

    def _resized(self, grid: Grid) -> Tensor:
        heads, queries, keys = self.relative_pos.shape[1:]
        old, new = self.reduced(self.table_grid), self.reduced(grid)
        table = self.relative_pos.reshape(heads * queries, keys).T[None]
        table = resize_position_table(table, old, new)[0].T.reshape(heads, queries, math.prod(new))
        table = table.transpose(0, 1).reshape(1, queries, heads * math.prod(new))
        table = resize_position_table(table, self.table_grid, grid)
        return table.reshape(math.prod(grid), heads, math.prod(new)).transpose(0, 1)[None]

    def forward(self, both: Pair, grid: Grid, run: Any) -> tuple[Pair, Grid]:
        if len(self.downsample):
            merge_words, merge_sentences = self.downsample
            both = merge_words.words(both[0], grid), merge_sentences(both[1], grid)  # type: ignore[operator]
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        return run(self.blocks, both, grid, self.bias(grid)), grid


_CONVS = [
    (rf"^patch_embed\.{theirs}\.{3 * number + part}\.", f"stem.{ours.format(number)}.{name}.")
    for theirs, ours, numbers in (("common_conv", "common", 1), ("inner_convs", "inner", 1), ("outer_convs", "outer.{}", 3))
    for number in range(numbers)
    for part, name in ((0, "conv"), (1, "norm"))
]
_MERGES = [
    (rf"^{theirs}_merges\.{number}\.{part}\.", f"stages.{number + 1}.downsample.{place}.{name}.")
    for number in range(3)
    for place, theirs in enumerate(("word", "sentence"))
    for part, name in (("norm", "norm"), (r"conv\.0", "conv"))
]
PYRAMID_OFFICIAL = chain(
    rename((r"^(outer|inner)_pos$", r"stem.\1_pos"), *_CONVS, *_MERGES, (r"\.inner_attn\.(q|kv)\.", r".inner_attn.words_\1.")),
    PARTS,
    join("qkv", "words_q", "words_kv"),
)


def _pyramid(width: int, depths: tuple[int, ...], heads: int, inner_heads: int, **options: Any) -> dict[str, Any]:
    """Return a variant; channels and heads of the stages have the ratio 1:2:4:4."""
    grow = (1, 2, 4, 4)
    return dict(
        depths=depths,
        dims=tuple(16 * width * g for g in grow),
        inner_dims=tuple(width * g for g in grow),
        num_heads=tuple(heads * g for g in grow),
        inner_heads=tuple(inner_heads * g for g in grow),
        **options,
    )


@family(
    "tnt",
    name="tnt_pyramid",
    variants={
        "pico": dict(
            depths=(2, 1),
            dims=(32, 64),
            inner_dims=(4, 8),
            num_heads=(2, 4),
            inner_heads=(1, 2),
            reductions=(2, 1),
            patch_size=4,
            image_size=16,
        ),
        "ti": _pyramid(5, (2, 6, 3, 2), 2, 1, image_size=192),  # 10.6 M, 75.2 % top-1
        "s": _pyramid(8, (2, 8, 4, 2), 4, 2, image_size=256),  # 32.0 M, 82.0 %
        "m": _pyramid(12, (2, 8, 6, 2), 4, 2, image_size=256),  # 85.0 M, 83.5 %
        "b": _pyramid(16, (2, 10, 6, 2), 4, 2, image_size=256),  # 157 M, 84.1 %
    },
    official=PYRAMID_OFFICIAL,
    crop_pct=0.9,
)
class PyramidTNT(Backbone):
    """PyramidTNT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes). Maps are those of the sentences.

    Args:
        depths: blocks per stage. The first block of a stage has an inner transformer, and the second too in a stage of more than 6 blocks.
        dims, inner_dims: channels of sentences and of words, per stage.
        num_heads, inner_heads: heads of the outer and of the inner attention, per stage.
        reductions: side, in sentences, of the averages that the outer attention attends to, per stage.
        mlp_ratio: ratio of hidden channels to channels in all MLPs.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the logits of all attentions; None: head_dim ** -0.5.
        se: gate the channels of the outer MLPs' outputs by the mean of the tokens (squeeze-and-excitation).
        patch_size: side of a sentence of the first stage, pixels, 8 or 4.
        image_size: side, in pixels, of the square image that the tables are made for.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: another patch_size, or lists that differ in length.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        inner_dims: Sequence[int],
        num_heads: Sequence[int],
        inner_heads: Sequence[int],
        reductions: Sequence[int] = (4, 2, 1, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        se: bool = False,
        patch_size: int = 8,
        image_size: int = 192,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if patch_size not in (4, 8):
            raise ValueError(f"patch_size must be 4 or 8, got {patch_size}")
        if len({len(row) for row in (depths, dims, inner_dims, num_heads, inner_heads, reductions)}) != 1:
            raise ValueError("depths, dims, inner_dims, num_heads, inner_heads and reductions need one value per stage")
        stages = [Stage(dim, patch_size * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.patch_size = patch_size
        self.table_grid = grid = self.grid(image_size, image_size)
        self.stem = PyramidStem(patch_size, in_chans, inner_dims[0], dims[0])
        self.stem.outer_pos = nn.Parameter(torch.empty(1, math.prod(grid), dims[0]))
        self.stem.inner_pos = nn.Parameter(torch.empty(1, SIDE**2, inner_dims[0]))
        self.cache = EvalCache()
        self.stages = nn.ModuleList()
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, se=se, qkv_bias=qkv_bias, scale=qk_scale)
        for k, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            merges = [Merge(row[k - 1], row[k]) for row in (inner_dims, dims)] if k else []
            inner = range(2 if depths[k] > 6 else 1)
            blocks = [
                PyramidBlock(
                    dims[k],
                    inner_dims[k],
                    num_heads[k],
                    inner_heads[k] if i in inner else None,
                    reductions[k],
                    drop_path=rate,
                    **options,
                )
                for i, rate in enumerate(rates)
            ]
            grid = (-(-grid[0] // 2), -(-grid[1] // 2)) if k else grid
            self.stages.append(PyramidTNTStage(blocks, merges, num_heads[k], reductions[k], grid))
        self.norm = LayerNorm2d(dims[-1], eps=EPS)
        init_weights(self, conv=False)
        for table in (self.stem.outer_pos, self.stem.inner_pos):
            nn.init.trunc_normal_(table, std=0.02)

    def grid(self, height: int, width: int) -> Grid:
        """Return the rows and columns of sentences of the first stage."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table of the sentences of a grid, (1, N, C)."""
        table: Tensor = self.stem.outer_pos  # type: ignore[assignment]
        return self.cache.for_grid(self, table, self.table_grid, grid)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the map of the sentences after each stage, (B, dim_i, h_i, w_i)."""
        grid = self.grid(*image.shape[-2:])
        words, sentences = self.stem(pad_to_multiple(image.permute(0, 2, 3, 1), self.patch_size).permute(0, 3, 1, 2))
        both = (words + self.stem.inner_pos, sentences + self.positions(grid))
        for stage in self.stages:
            both, grid = stage(both, grid, self.run_blocks)
            yield as_map(both[1], grid)

    def no_weight_decay(self) -> set[str]:
        return {"stem.outer_pos", "stem.inner_pos"}
