"""CvT: convolutional token embeddings and projections, no position embedding (Wu et al., "CvT", 2021).

The idea: a pyramid of three ViTs whose tokens are embedded by overlapping convolutions. Queries, keys and values are computed by a
depth-wise 3 x 3 convolution before the linear layer, with stride 2 for keys and values, which reduces the cost of attention four times. The
zero padding of the convolutions provides position information, so there is no position embedding and any image size works. Only the last
stage has a class token.

    q = W_q BN(DW x),  k, v = W BN(DW_stride 2 x),  the class token is not convolved;  softmax(q k^T / sqrt(C)) v
    x <- x + Attention(LN(x));  x <- x + MLP(LN(x)) with the activation x sigmoid(1.702 x)

The logits are scaled by the full width C, not by the width of a head, as in the released models.
Follows the authors' code (github microsoft/CvT); its checkpoints load by name. transformers' checkpoints load too (its model uses the exact
GELU; here it is the approximation that the weights were trained with, or the exact one by `act_layer`).
Left out: strides of the queries, with which the authors' residual sum fails; dropout per stage, which is 0 in all configs; the position
embedding of the configs, which the authors' code does not read. Projections that are all linear, an ablation of the paper, fail in the
authors' code and work here.
Cost: quadratic in image area, a quarter of full attention.

Speed: tokens and map of a stage share their memory (channels-last); attention runs in the fused kernel; `fuse()` folds the batch norms into
the depth-wise convolutions.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitarium.catalog import chain, family, rename
from vitarium.nn import (
    Backbone,
    ConvNorm,
    DropPath,
    LayerNorm2d,
    Linear,
    Mlp,
    QuickGELU,
    Stage,
    drop_path_rates,
    init_weights,
    per_stage,
)
from vitarium.nn.backbone import POOLS
from vitarium.nn.pvt import OverlapPatchEmbed
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens

Grid = tuple[int, int]
KERNELS, STRIDES, PADDINGS = (7, 3, 3), (4, 2, 2), (2, 1, 1)
"""Kernel sizes, strides and paddings of the three token embeddings."""
PROJECTIONS = ("dw_bn", "avg", "linear")
ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ConvAttention(nn.Module):
    """Attention with convolutional projections: tokens (B, P + h w, dim) of a grid (h, w) -> the same shape.

    Args:
        dim: channels.
        num_heads: heads.
        kv_stride: stride of the convolutions of keys and values.
        prefix: number P of leading class tokens, which are not convolved.
        projection: "dw_bn" for depth-wise convolutions and batch norms, "avg" for average pooling of keys and values alone, "linear" for
            neither.
        kernel: side of the convolutions or of the pooling.
        kv_padding: padding of those of keys and values; None: half the kernel.
        qkv_bias: whether the linear projections to queries, keys and values have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_stride: int,
        prefix: int,
        *,
        projection: str = "dw_bn",
        kernel: int = 3,
        kv_padding: int | None = None,
        qkv_bias: bool = True,
    ):
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
        if projection == "dw_bn" and kernel % 2 == 0:
            raise ValueError(f"the kernel of depth-wise projections must be odd to keep the map size, got {kernel}; try {kernel + 1}")
        super().__init__()
        self.num_heads, self.prefix, self.scale = num_heads, prefix, dim**-0.5
        padding = kernel // 2 if kv_padding is None else kv_padding

        def convolution(stride: int, around: int) -> nn.Module:
            if projection == "dw_bn":
                return ConvNorm(dim, dim, kernel, stride, padding=around, groups=dim)
            return nn.AvgPool2d(kernel, stride, around, ceil_mode=True) if projection == "avg" else nn.Identity()

        self.conv_proj_q = convolution(1, kernel // 2) if projection == "dw_bn" else nn.Identity()
        self.conv_proj_k, self.conv_proj_v = convolution(kv_stride, padding), convolution(kv_stride, padding)
        self.proj_q, self.proj_k, self.proj_v = (Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        image = as_map(x[:, self.prefix :], grid)
        parts = (self.conv_proj_q, self.proj_q), (self.conv_proj_k, self.proj_k), (self.conv_proj_v, self.proj_v)
        q, k, v = (linear(self._with_prefix(x, as_tokens(conv(image)))) for conv, linear in parts)
        return self.proj(multi_head_attention(q, k, v, self.num_heads, scale=self.scale))

    def _with_prefix(self, x: Tensor, convolved: Tensor) -> Tensor:
        return torch.cat([x[:, : self.prefix], convolved], 1) if self.prefix else convolved


class CvTBlock(nn.Module):
    """CvT block: tokens (B, P + h w, dim) of a grid (h, w) -> the same shape."""

    def __init__(self, dim: int, attention: ConvAttention, mlp_ratio: float, act_layer: type[nn.Module], drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvTStage(nn.Module):
    """CvT stage: map (B, C_in, H, W) -> map (B, dim, h, w), or with a class token -> tokens (B, 1 + h w, dim)."""

    def __init__(self, downsample: OverlapPatchEmbed, blocks: Sequence[CvTBlock], cls_token: nn.Parameter | None):
        super().__init__()
        self.downsample = downsample
        self.cls_token = cls_token
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, grid: Grid, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x).flatten(1, 2)
        if self.cls_token is None:
            return as_map(run(self.blocks, x, grid), grid)
        return run(self.blocks, torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1), grid)


OFFICIAL = rename((r"^stage(\d)\.patch_embed\.", r"stages.\1.downsample."), (r"^stage(\d)\.", r"stages.\1."))
_ATTENTION = r"^cvt\.encoder\.stages\.(\d)\.layers\.(\d+)\.attention\.attention\."
TRANSFORMERS = chain(
    rename(
        (r"^cvt\.encoder\.stages\.(\d)\.embedding\.convolution_embeddings\.projection\.", r"stages.\1.downsample.proj."),
        (r"^cvt\.encoder\.stages\.(\d)\.embedding\.convolution_embeddings\.normalization\.", r"stages.\1.downsample.norm."),
        (r"^cvt\.encoder\.stages\.(\d)\.cls_token$", r"stages.\1.cls_token"),
        *(
            rule
            for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
            for rule in (
                (
                    rf"{_ATTENTION}convolution_projection_{theirs}\.convolution_projection\.convolution\.",
                    rf"stages.\1.blocks.\2.attn.conv_proj_{ours}.conv.",
                ),
                (
                    rf"{_ATTENTION}convolution_projection_{theirs}\.convolution_projection\.normalization\.",
                    rf"stages.\1.blocks.\2.attn.conv_proj_{ours}.bn.",
                ),
                (rf"{_ATTENTION}projection_{theirs}\.", rf"stages.\1.blocks.\2.attn.proj_{ours}."),
            )
        ),
        (r"^cvt\.encoder\.stages\.(\d)\.layers\.(\d+)\.attention\.output\.dense\.", r"stages.\1.blocks.\2.attn.proj."),
        (r"^cvt\.encoder\.stages\.(\d)\.layers\.(\d+)\.intermediate\.dense\.", r"stages.\1.blocks.\2.mlp.fc1."),
        (r"^cvt\.encoder\.stages\.(\d)\.layers\.(\d+)\.output\.dense\.", r"stages.\1.blocks.\2.mlp.fc2."),
        (r"^cvt\.encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm_before\.", r"stages.\1.blocks.\2.norm1."),
        (r"^cvt\.encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm_after\.", r"stages.\1.blocks.\2.norm2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    )
)
_13 = dict(dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6), drop_path_rate=0.1)
_21 = dict(dims=(64, 192, 384), depths=(1, 4, 16), num_heads=(1, 3, 6), drop_path_rate=0.1)


@family(
    "cvt",
    variants={
        "pico": dict(dims=(24, 48), depths=(1, 3), num_heads=(1, 2), kernels=(3, 3), strides=(2, 2), paddings=(1, 1), image_size=16),
        "13": _13,  # 20.0 M, 81.6 % top-1
        "13_384": dict(**_13, image_size=384),  # 83.0 %
        "21": _21,  # 31.6 M, 82.5 %
        "21_384": dict(**_21, image_size=384),  # 83.3 %
        "w24_384": dict(dims=(192, 768, 1024), depths=(2, 2, 20), num_heads=(3, 12, 16), drop_path_rate=0.3, image_size=384),
    },
    official=OFFICIAL,
    dialects={"transformers": TRANSFORMERS},
    weights={
        "13": {"in1k": ("hf:microsoft/cvt-13",)},
        "13_384": {"in1k": ("hf:microsoft/cvt-13-384",), "in22k_ft_in1k": ("hf:microsoft/cvt-13-384-22k",)},
        "21": {"in1k": ("hf:microsoft/cvt-21",)},
        "21_384": {"in1k": ("hf:microsoft/cvt-21-384",), "in22k_ft_in1k": ("hf:microsoft/cvt-21-384-22k",)},
        "w24_384": {"in22k_ft_in1k": ("hf:microsoft/cvt-w24-384-22k",)},
    },
)
class CvT(Backbone):
    """CvT classifier: images (B, in_chans, H, W), H and W at least 3 pixels, -> logits (B, num_classes).

    Features are the tokens of the last stage, (B, 1 + h w, C), or without a class token its map (B, C, h, w), whose mean is classified;
    `forward_intermediates` returns maps. The arguments are over 15 so that the authors' configs can be expressed.

    Args:
        dims, depths, num_heads: channels, blocks and heads per stage.
        kernels, strides, paddings: of the token embedding of each stage.
        kv_stride, projection, qkv_kernel, kv_padding, qkv_bias: see `ConvAttention`; one value for all stages or one per stage.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels, for all stages or per stage.
        cls_tokens: whether each stage has a class token, which is dropped after a stage that is not the last; None: only the last.
        act_layer: activation of the MLPs: "quick_gelu" as in all released models, or "gelu".
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0 inside the last stage and are 0 before.

    Raises:
        ValueError: lists of different lengths, another projection or act_layer, or an even kernel of depth-wise projections.
    """

    pools = ("token", *POOLS)

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        kernels: Sequence[int] = KERNELS,
        strides: Sequence[int] = STRIDES,
        paddings: Sequence[int] = PADDINGS,
        kv_stride: int | Sequence[int] = 2,
        projection: str | Sequence[str] = "dw_bn",
        qkv_kernel: int | Sequence[int] = 3,
        kv_padding: int | Sequence[int] | None = None,
        qkv_bias: bool | Sequence[bool] = True,
        mlp_ratio: float | Sequence[float] = 4.0,
        cls_tokens: Sequence[bool] | None = None,
        act_layer: str = "quick_gelu",
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len({len(row) for row in (dims, depths, num_heads, kernels, strides, paddings)}) > 1:
            raise ValueError("dims, depths, num_heads, kernels, strides and paddings need one value per stage")
        stages = [Stage(dim, math.prod(strides[: k + 1])) for k, dim in enumerate(dims)]
        super().__init__(
            stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=max(1, kernels[0] - 2 * paddings[0])
        )
        if act_layer not in ACTIVATIONS:
            raise ValueError(f"act_layer must be one of {', '.join(ACTIVATIONS)}, got {act_layer!r}")
        count, last = len(dims), len(dims) - 1
        options = dict(kv_stride=kv_stride, projection=projection, kernel=qkv_kernel, kv_padding=kv_padding, qkv_bias=qkv_bias)
        each: dict[str, Any] = {name: per_stage(cast(Any, value), count, name) for name, value in options.items()}
        ratios = per_stage(mlp_ratio, count, "mlp_ratio")
        tokens = [k == last for k in range(count)] if cls_tokens is None else per_stage(cls_tokens, count, "cls_tokens")
        rates = [[0.0] * depth for depth in depths[:last]] + drop_path_rates(drop_path_rate, depths[last:])

        def block(k: int, rate: float) -> CvTBlock:
            attention = ConvAttention(dims[k], num_heads[k], prefix=int(tokens[k]), **{name: values[k] for name, values in each.items()})
            return CvTBlock(dims[k], attention, ratios[k], ACTIVATIONS[act_layer], rate)

        self.stages = nn.ModuleList(
            CvTStage(
                OverlapPatchEmbed(dims[k - 1] if k else in_chans, dims[k], strides[k], kernel_size=kernels[k], padding=paddings[k]),
                [block(k, rate) for rate in rates[k]],
                nn.Parameter(torch.empty(1, 1, dims[k])) if tokens[k] else None,
            )
            for k in range(count)
        )
        self.norm = nn.LayerNorm(dims[-1]) if tokens[last] else LayerNorm2d(dims[-1])
        self.pools = ("token", *POOLS) if tokens[last] else tuple(POOLS)
        self.global_pool = self.pools[0]
        init_weights(self, conv=False)
        for name, parameter in self.named_parameters():
            if name.endswith("cls_token"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def grids(self, height: int, width: int) -> list[Grid]:
        """Return the rows and columns of tokens of each stage."""
        grids = []
        for stage in self.stages:
            height, width = stage.downsample.grid(height, width)  # type: ignore[union-attr,operator]
            grids.append((height, width))
        return grids

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the map of each stage, (B, dim_k, h_k, w_k), or of a last stage with a class token the tokens (B, 1 + h w, C)."""
        x = image.contiguous(memory_format=torch.channels_last)
        grids = self.grids(*image.shape[-2:])
        for k, (stage, grid) in enumerate(zip(self.stages, grids, strict=True)):
            x = stage(x, grid, self.run_blocks)
            if x.ndim == 3 and k < len(grids) - 1:
                x = as_map(x[:, 1:], grid)
            yield x

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def as_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        return features if features.ndim == 4 else as_map(features[:, 1:], self.grids(*image_size)[-1])

    def pool(self, features: Tensor) -> Tensor:
        """Return the class token ("token"), or the mean or maximum of the other tokens or the map: (B, 1 + h w, C) -> (B, C)."""
        if features.ndim == 4:
            return super().pool(features)
        return features[:, 0] if self.global_pool == "token" else POOLS[self.global_pool](features[:, 1:].transpose(1, 2))
