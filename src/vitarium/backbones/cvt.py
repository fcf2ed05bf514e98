"""CvT: convolutional token embeddings and projections, no position embedding (Wu et al., "CvT", 2021).

The idea: a pyramid of three ViTs whose tokens are embedded by overlapping convolutions. Queries, keys and values are computed by a
depth-wise 3 x 3 convolution before the linear layer, with stride 2 for keys and values, which reduces the cost of attention four times. The
zero padding of the convolutions provides position information, so there is no position embedding and any image size works. Only the last
stage has a class token.

    q = W_q BN(DW x),  k, v = W BN(DW_stride 2 x),  the class token is not convolved;  softmax(q k^T / sqrt(C)) v
    x <- x + Attention(LN(x));  x <- x + MLP(LN(x)) with the activation x sigmoid(1.702 x)

The logits are scaled by the full width C, not by the width of a head, as in the released models.
Follows the authors' code (github microsoft/CvT); its checkpoints load by name. transformers' checkpoints load too (its model uses the exact
GELU; here it is the approximation that the weights were trained with).
Cost: quadratic in image area, a quarter of full attention.

Speed: tokens and map of a stage share their memory (channels-last); attention runs in the fused kernel; `fuse()` folds the batch norms into
the depth-wise convolutions.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vitarium.catalog import chain, family, rename
from vitarium.nn import Backbone, ConvNorm, DropPath, Linear, Mlp, QuickGELU, Stage, drop_path_rates, init_weights
from vitarium.nn.backbone import POOLS
from vitarium.nn.pvt import OverlapPatchEmbed
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens

Grid = tuple[int, int]
KERNELS, STRIDES, PADDINGS = (7, 3, 3), (4, 2, 2), (2, 1, 1)
"""Kernel sizes, strides and paddings of the three token embeddings."""


class ConvAttention(nn.Module):
    """Attention with convolutional projections: tokens (B, P + h w, dim) of a grid (h, w) -> the same shape.

    Args:
        dim: channels.
        num_heads: heads.
        kv_stride: stride of the convolutions of keys and values.
        prefix: number P of leading class tokens, which are not convolved.
    """

    def __init__(self, dim: int, num_heads: int, kv_stride: int, prefix: int):
        super().__init__()
        self.num_heads, self.prefix, self.scale = num_heads, prefix, dim**-0.5
        self.conv_proj_q = ConvNorm(dim, dim, 3, groups=dim)
        self.conv_proj_k = ConvNorm(dim, dim, 3, kv_stride, groups=dim)
        self.conv_proj_v = ConvNorm(dim, dim, 3, kv_stride, groups=dim)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        image = as_map(x[:, self.prefix :], grid)
        parts = (self.conv_proj_q, self.proj_q), (self.conv_proj_k, self.proj_k), (self.conv_proj_v, self.proj_v)
        q, k, v = (linear(self._with_prefix(x, as_tokens(conv(image)))) for conv, linear in parts)
        return self.proj(multi_head_attention(q, k, v, self.num_heads, scale=self.scale))

    def _with_prefix(self, x: Tensor, convolved: Tensor) -> Tensor:
        return torch.cat([x[:, : self.prefix], convolved], 1) if self.prefix else convolved


class CvTBlock(nn.Module):
    """CvT block: tokens (B, P + h w, dim) of a grid (h, w) -> the same shape."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, kv_stride: int, prefix: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, num_heads, kv_stride, prefix)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), QuickGELU)
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

    Features are the tokens of the last stage, (B, 1 + h w, C); `forward_intermediates` returns maps.

    Args:
        dims, depths, num_heads: channels, blocks and heads per stage.
        kernels, strides, paddings: of the token embedding of each stage.
        kv_stride: stride of the convolutions of keys and values.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0 inside the last stage and are 0 before.

    Raises:
        ValueError: lists of different lengths.
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
        kv_stride: int = 2,
        mlp_ratio: float = 4.0,
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
        last = len(dims) - 1
        rates = [[0.0] * depth for depth in depths[:last]] + drop_path_rates(drop_path_rate, depths[last:])
        self.stages = nn.ModuleList(
            CvTStage(
                OverlapPatchEmbed(dims[k - 1] if k else in_chans, dims[k], strides[k], kernel_size=kernels[k], padding=paddings[k]),
                [CvTBlock(dims[k], num_heads[k], mlp_ratio, kv_stride, int(k == last), rate) for rate in rates[k]],
                nn.Parameter(torch.empty(1, 1, dims[k])) if k == last else None,
            )
            for k in range(len(dims))
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.global_pool = "token"
        init_weights(self, conv=False)
        nn.init.trunc_normal_(self.stages[last].cls_token, std=0.02)  # type: ignore[arg-type]

    def grids(self, height: int, width: int) -> list[Grid]:
        """Return the rows and columns of tokens of each stage."""
        grids = []
        for stage in self.stages:
            height, width = stage.downsample.grid(height, width)  # type: ignore[union-attr,operator]
            grids.append((height, width))
        return grids

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the map of each stage, (B, dim_k, h_k, w_k), except for the last, whose tokens (B, 1 + h w, C) are yielded."""
        x = image.contiguous(memory_format=torch.channels_last)
        for stage, grid in zip(self.stages, self.grids(*image.shape[-2:]), strict=True):
            x = stage(x, grid, self.run_blocks)
            yield x

    def as_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        return features if features.ndim == 4 else as_map(features[:, 1:], self.grids(*image_size)[-1])

    def pool(self, features: Tensor) -> Tensor:
        """Return the class token ("token"), or the mean or maximum of the other tokens: (B, 1 + h w, C) -> (B, C)."""
        return features[:, 0] if self.global_pool == "token" else POOLS[self.global_pool](features[:, 1:].transpose(1, 2))
