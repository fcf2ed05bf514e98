"""CrossFormer: multi-scale tokens, alternating short- and long-distance attention (Wang et al., 2022; CrossFormer++, 2023).

The idea: each token embeds several concentric patches (4, 8, 16 and 32 pixels wide at stride 4), so that attention relates objects of
different sizes. Blocks alternate between short-distance attention in G x G windows and long-distance attention among G x G tokens sampled
at interval I. The bias of a pair of tokens is a small MLP of their offset, so that any group size works.

    token = LN([W_4 * x, W_8 * x, W_16 * x, W_32 * x]) with widths C/2, C/4, C/8, C/8;  between stages the same with 2 and 4
    x <- x + Attention(LN(x)), near or far;  x <- x + MLP(LN(x));  logits q k^T / sqrt(d) + MLP(dy, dx)
    CrossFormer++ adds an amplitude cooling layer after each third block except the last of a stage: x <- LN(DW_3x3(x))

Follows the authors' code (github cheerss/CrossFormer); its checkpoints load by name. Any image of at least 32 pixels per side: padding is
masked, and on a map smaller than a group the group is as wide as the shorter side of the map. (The authors' classifier needs square
images.)
Left out, since no config or released model has them: dropout of the attention weights; a conditional position encoding, which mixes rows
with channels in the authors' code; intervals that adapt to the map (give them as `intervals`). The experiments with group sizes that grow
from block to block are lists in `group_sizes`.
Cost: linear in image area at fixed G.

Speed: padding exists only inside attention windows, not as tokens; biases are evaluated once per group size in evaluation mode.

Legend: B batch, C channels, H W map, N tokens of the map, G group side, I interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vitarium.catalog import chain, family, part_of, rename
from vitarium.nn import (
    Backbone,
    DropPath,
    EvalCache,
    LayerNorm2d,
    LayoutCache,
    Mlp,
    Stage,
    WindowAttention,
    drop_path_rates,
    fit_position_table,
    init_weights,
    per_stage,
)
from vitarium.ops.windows import WindowLayout, attention_layout, relative_position_index


@dataclass(frozen=True, eq=False)
class Groups(WindowLayout):
    """Window layout that is filled from a map without padding.

    Attributes:
        take: (places,) int64; index of the token of the map at each place. Padded places hold any token, which is masked.
        back: (N,) int64; place of each token.
    """

    take: Tensor
    back: Tensor

    @classmethod
    def of(
        cls, height: int, width: int, size: int, interval: int, device: torch.device, *, around: bool = False, mask: bool = True
    ) -> Groups:
        """Build the groups of a map of height x width tokens; `around` pads on all sides, `mask` hides the padding from attention."""
        rows, columns = (side + -side % (size * interval) for side in (height, width))
        top, left = ((rows - height) // 2, (columns - width) // 2) if around else (0, 0)
        whole = attention_layout(rows, columns, size, interval=interval, device=device)
        y, x = whole.order // columns - top, whole.order % columns - left
        take = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        back = whole.inverse.view(rows, columns)[top : top + height, left : left + width].flatten()
        if (rows, columns) == (height, width):
            return cls(**vars(whole), take=take, back=back)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        region = (~inside).long().view(-1, size * size) if mask else None
        return cls(whole.order, whole.inverse, inside[:, None], region, size, -math.inf, take=take, back=back)


def cross_scale(in_dim: int, dim: int, kernels: Sequence[int], stride: int) -> nn.ModuleList:
    """Build concentric convolutions, (B, in_dim, H, W) -> (B, dim_j, H // stride, W // stride) each.

    Larger kernels have fewer channels: a half, a quarter, ..., the last two the same number.

    Raises:
        ValueError: kernels that cannot be centred, or too few channels for them.
    """
    if not kernels or any(k < stride or (k - stride) % 2 for k in kernels):
        raise ValueError(f"each kernel must be the stride {stride} plus an even number, got {tuple(kernels)}")
    shares = [2 ** (j + 1) for j in range(len(kernels) - 1)]
    if dim % max(shares, default=1):
        raise ValueError(f"{len(kernels)} kernels need channels divisible by {shares[-1]}, got {dim}")
    dims = [dim // share for share in shares]
    dims.append(dim - sum(dims))
    return nn.ModuleList(nn.Conv2d(in_dim, d, k, stride, (k - stride) // 2) for d, k in zip(dims, kernels, strict=True))


class CrossScaleEmbed(nn.Module):
    """Cross-scale embedding, the stem, with an optional norm: (B, in_chans, H, W) -> (B, H // stride, W // stride, dim)."""

    def __init__(self, in_chans: int, dim: int, kernels: Sequence[int], norm: bool = True):
        super().__init__()
        self.stride = kernels[0] if kernels else 1
        self.projs = cross_scale(in_chans, dim, kernels, self.stride)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of tokens of an image of height x width."""
        return height // self.stride, width // self.stride

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(torch.cat([proj(image) for proj in self.projs], 1).permute(0, 2, 3, 1))


class CrossScaleMerging(nn.Module):
    """Cross-scale downsampling between stages, after a norm: (B, H, W, C) -> (B, H // 2, W // 2, 2 C)."""

    def __init__(self, dim: int, kernels: Sequence[int]):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = cross_scale(dim, 2 * dim, kernels, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([reduction(x) for reduction in self.reductions], 1).permute(0, 2, 3, 1)


class DynamicPositionBias(nn.Module):
    """Relative position bias computed by an MLP from the offset between two tokens: G -> (heads, n, n), n = G * G, query by key."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        hidden = max(1, dim // 16)  # the authors' code divides by four twice
        self.pos_proj = nn.Linear(2, hidden)
        layer = lambda out: nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))
        self.pos1, self.pos2, self.pos3 = layer(hidden), layer(hidden), layer(num_heads)

    def of_offsets(self, offsets: Tensor) -> Tensor:
        """Return the biases (..., heads) of offsets (..., 2) in rows and columns, tokens."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))

    def forward(self, size: int) -> Tensor:
        weight = self.pos_proj.weight
        offset = torch.arange(1 - size, size, device=weight.device)
        table = self.of_offsets(torch.cartesian_prod(offset, offset).to(weight.dtype).view(len(offset) ** 2, 2))
        index = relative_position_index(size, size, weight.device)
        return table[index.flatten()].view(size**2, size**2, table.shape[1]).permute(2, 0, 1)


class CrossFormerBlock(nn.Module):
    """CrossFormer block: (B, H, W, dim) -> the same shape.

    Args:
        dim, num_heads, mlp_ratio: of attention and MLP.
        far: long-distance attention at interval I; otherwise short-distance attention.
        cool: add an amplitude cooling layer.
        drop_path: stochastic depth rate of both branches.
        qkv_bias, qk_scale: see `vitarium.nn.WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        far: bool,
        cool: bool,
        drop_path: float,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ):
        super().__init__()
        self.far = far
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, DynamicPositionBias(dim, num_heads), qkv_bias=qkv_bias, scale=qk_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cool else None
        self.ex_ln = nn.LayerNorm(dim) if cool else None

    def forward(self, x: Tensor, near: Groups, far: Groups) -> Tensor:
        groups = far if self.far else near
        tokens = x.flatten(1, 2)
        y = self.norm1(tokens).index_select(1, groups.take)
        if groups.inside is not None and groups.region is None:
            y = y * groups.inside  # padding that is not masked is zero after the norm
        y = self.attn(y, groups).index_select(1, groups.back)
        tokens = tokens + self.drop_path(y)
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        x = tokens.view(x.shape)
        if self.ex_conv is None or self.ex_ln is None:
            return x
        return self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CrossFormerStage(nn.Module):
    """Downsampling and blocks that alternate short- and long-distance attention: (B, H, W, C_in) -> (B, H', W', C).

    Args:
        group_sizes: side G of the groups of each block, tokens.
        interval: I of the long-distance attention.
        padding: see `Groups.of`.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], group_sizes: Sequence[int], interval: int, padding: Mapping[str, bool]
    ):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.group_sizes, self.interval, self.padding = list(group_sizes), interval, dict(padding)
        self.kept = LayoutCache()

    def groups(self, height: int, width: int, device: torch.device) -> dict[int, tuple[Groups, Groups]]:
        """Return the short- and the long-distance groups of a map, for each of `group_sizes`."""

        def build(side: int) -> tuple[Groups, Groups]:
            size = min(side, height, width)
            near = Groups.of(height, width, size, 1, device, **self.padding)
            if self.interval == 1 or min(height, width) <= side:
                return near, near
            return near, Groups.of(height, width, size, self.interval, device, **self.padding)

        return self.kept.get(height, width, device, lambda: {side: build(side) for side in sorted(set(self.group_sizes))})

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x)
        groups = self.groups(x.shape[1], x.shape[2], x.device)
        for block, side in zip(self.blocks, self.group_sizes, strict=True):
            x = run([block], x, *groups[side])
        return x


OFFICIAL = chain(
    part_of("backbone."),  # of a detector or segmenter
    rename(
        (r"(^|\.)(biases|relative_position_index|attn_mask)$", None),
        (r"^absolute_pos_embed$", "pos_embed"),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.pos\.", r"stages.\1.blocks.\2.attn.position_bias."),
        *((rf"^layers\.{k}\.downsample\.", f"stages.{k + 1}.downsample.") for k in range(9)),
        (r"^layers\.", "stages."),
    ),
)
_SMALL, _BASE, _LARGE = (  # the same three architectures in both papers
    dict(embed_dim=dim, depths=(2, 2, depth, 2), num_heads=tuple(dim // 32 * 2**k for k in range(4)), drop_path_rate=rate)
    for dim, depth, rate in ((96, 6, 0.2), (96, 18, 0.3), (128, 18, 0.5))
)
_PP = dict(group_sizes=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooling=True)


@family(
    "crossformer",
    variants={
        "pico": dict(
            embed_dim=32, depths=(2, 2), num_heads=(2, 4), group_sizes=(4, 4), intervals=(2, 1), kernels=(2, 4, 8, 16), image_size=16
        ),
        "tiny": dict(embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16), drop_path_rate=0.1),  # 27.8 M, 81.5 % top-1
        "small": _SMALL,  # 30.7 M, 82.5 %
        "base": _BASE,  # 52.0 M, 83.4 %
        "large": _LARGE,  # 92.0 M, 84.0 %
        "pp_small": dict(embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.2, **_PP),  # 23.3 M, 83.2 %
        "pp_base": _BASE | _PP,  # 52.0 M, 84.2 %
        "pp_large": _LARGE | _PP,  # 92.0 M, 84.7 %
        "pp_huge": _LARGE | _PP | dict(depths=(6, 6, 18, 2)),  # 96.0 M, 84.9 %
    },
    official=OFFICIAL,
    crop_pct=0.875,
)
class CrossFormer(Backbone):
    """CrossFormer classifier: images (B, in_chans, H, W) -> logits (B, num_classes).

    H and W must be at least one token of the last map (32 pixels). The arguments are over 15 so that the authors' configs can be expressed.

    Args:
        embed_dim: channels C of the first stage; each later stage doubles them.
        depths: blocks per stage.
        num_heads: heads per stage.
        group_sizes: side G of the groups, tokens, per stage, or a list of them for the blocks of a stage; may differ from those of
            pretraining.
        intervals: interval I between tokens of a long-distance group, per stage; 1: only short-distance attention.
        kernels: kernel sizes of the stem, pixels; the smallest is also its stride.
        merge_kernels: kernel sizes of the downsampling layers, cells of the previous map; a list per layer if they differ.
        mlp_ratio: ratio of the MLP's hidden channels to C, for all stages or per stage.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the attention logits; None: head_dim ** -0.5.
        patch_norm: whether a layer norm follows the stem.
        pos_embed: whether a learned absolute position is added to each token of the stem (`ape` of the authors).
        image_size: side, or (height, width), in pixels, of the image that the position table is made for; it is resampled for others.
        pad_around: whether maps are padded on all sides in place of the end alone (`pad_type` 1 of the authors).
        mask_padding: whether padding is hidden from attention; False: it is zero after the norm (`no_mask` of the authors).
        cooling: add an amplitude cooling layer after each third block (CrossFormer++).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, kernels that cannot be centred, sizes below 1, or channels that are not divisible.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        group_sizes: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
        intervals: Sequence[int] = (8, 4, 2, 1),
        kernels: Sequence[int] = (4, 8, 16, 32),
        merge_kernels: Sequence[int] | Sequence[Sequence[int]] = (2, 4),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        pos_embed: bool = False,
        image_size: int | Sequence[int] = 224,
        pad_around: bool = False,
        mask_padding: bool = True,
        cooling: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        sizes = _sizes_per_block(depths, num_heads, group_sizes, intervals)
        ratios = per_stage(mlp_ratio, len(depths), "mlp_ratio")
        merges = _merges(merge_kernels, len(depths) - 1)
        dims = [embed_dim * 2**k for k in range(len(depths))]
        stages = [Stage(dim, min(kernels, default=1) * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=stages[-1].stride)
        self.patch_embed = CrossScaleEmbed(in_chans, embed_dim, sorted(kernels), patch_norm)
        self.table_grid = self.patch_embed.grid(*per_stage(image_size, 2, "image_size"))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.table_grid), embed_dim)) if pos_embed else None
        self.cache = EvalCache()
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            CrossFormerStage(
                CrossScaleMerging(dims[k - 1], merges[k - 1]) if k else nn.Identity(),
                [
                    CrossFormerBlock(
                        dims[k],
                        num_heads[k],
                        ratios[k],
                        far=i % 2 == 1,
                        cool=cooling and i % 3 == 2 and i < depth - 1,
                        drop_path=rates[k][i],
                        qkv_bias=qkv_bias,
                        qk_scale=qk_scale,
                    )
                    for i in range(depth)
                ],
                sizes[k],
                intervals[k],
                dict(around=pad_around, mask=mask_padding),
            )
            for k, depth in enumerate(depths)
        )
        self.norm = LayerNorm2d(dims[-1])
        init_weights(self, conv=False)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(image.contiguous(memory_format=torch.channels_last))
        if self.pos_embed is not None:
            grid = self.patch_embed.grid(*image.shape[-2:])
            x = x + self.cache.for_grid(self, self.pos_embed, self.table_grid, grid).unflatten(1, grid)
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x.permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        return set() if self.pos_embed is None else {"pos_embed"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        return fit_position_table(tensor, shape, self.table_grid) if name == "pos_embed" else None


def _sizes_per_block(
    depths: Sequence[int], num_heads: Sequence[int], group_sizes: Sequence[int | Sequence[int]], intervals: Sequence[int]
) -> list[list[int]]:
    """Return the group size of each block of each stage, after the checks of the lists."""
    if not len(depths) == len(num_heads) == len(group_sizes) == len(intervals):
        given = f"{depths}, {num_heads}, {group_sizes} and {intervals}"
        raise ValueError(f"depths, num_heads, group_sizes and intervals need one value per stage, got {given}")
    sizes = [per_stage(size, depth, "group_sizes of a stage") for size, depth in zip(group_sizes, depths, strict=True)]
    if min(*(size for row in sizes for size in row), *intervals) < 1:
        raise ValueError(f"group_sizes and intervals must be at least 1, got {group_sizes} and {intervals}")
    return sizes


def _merges(kernels: Sequence[int] | Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Return the kernel sizes of each of `count` downsampling layers."""
    if all(isinstance(kernel, int) for kernel in kernels):
        return [cast(Sequence[int], kernels)] * count
    if len(kernels) != count:
        raise ValueError(f"merge_kernels needs one list of kernel sizes for all downsampling layers, or {count} lists; got {kernels}")
    return list(cast(Sequence[Sequence[int]], kernels))
