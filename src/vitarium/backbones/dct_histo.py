"""DCT-HistoTransformer: attention between low DCT frequencies in parallel with a convolution (2024, for histopathology images).

The network is meant for small data sets and small hardware. In each block, one branch computes the cosine transform of the map, keeps the
k x k lowest frequencies, applies attention between them and transforms back: global context with few tokens, a quarter of all at k = H / 2.
The high frequencies that it discards are processed by the other branch, an inverted bottleneck on the map; a 1 x 1 convolution merges both.

    z = DCT(x)[:k, :k] / sqrt(H W) + p;  z <- z + Attention(LN(z));  z <- z + MLP(LN(z));  low = DCT^-1(sqrt(H W) z, zeros elsewhere)
    x <- x + BN(W [low, MobileConv(x)]),  p one vector per frequency

No code and no weights were published; details that the paper does not specify (sizes, position of the transform, merging of the branches)
are this library's choice. Any image size: k is fixed, so the cost of attention is constant; a map smaller than k keeps all frequencies.
Cost: linear in area, except for the transform, area times k.

Speed: the transform is two matrix products that compute only the kept coefficients; `fuse()` folds all batch norms.

Legend: B batch, C channels, H W map, k kept frequencies per side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import (
    Backbone,
    ConvNorm,
    PyramidStage,
    SqueezeExcite,
    Stage,
    TransformerBlock,
    fold_pair,
    init_convs_by_fan_out,
    init_weights,
)
from vitarium.ops.maps import as_map, as_tokens
from vitarium.ops.spectral import dct2, idct2

ATTENTIONS = ("dct", "spatial", "none")
HEAD_DIM = 16


class DCTLowPass(nn.Module):
    """Ideal low-pass filter that keeps the `keep` x `keep` lowest frequencies: (B, C, H, W) -> the same shape."""

    def __init__(self, keep: int):
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        return idct2(dct2(x, kept(self.keep, size)), size).to(x.dtype)

    @torch.no_grad()
    def energy_share(self, x: Tensor) -> Tensor:
        """Return the share of the energy of a map that passes the filter, in [0, 1]: (B, C, H, W) -> (B, C)."""
        passed = dct2(x, kept(self.keep, (x.shape[-2], x.shape[-1]))).square().sum((2, 3))
        return passed / x.to(passed.dtype).square().sum((2, 3)).clamp_min(torch.finfo(passed.dtype).tiny)


def kept(keep: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the number of kept frequencies per side for a map of this size."""
    return min(keep, size[0]), min(keep, size[1])


class DCTAttention2d(TransformerBlock):
    """Transformer block on the lowest DCT frequencies; higher ones are zero in the output: (B, dim, H, W) -> the same shape.

    Args:
        dim: channels, a multiple of 16, the width of a head.
        keep: frequencies k per side.
    """

    def __init__(self, dim: int, keep: int):
        super().__init__(dim, dim // HEAD_DIM, mlp_ratio=2)
        self.keep = keep
        self.pos = nn.Parameter(torch.empty(keep, keep, dim))
        nn.init.trunc_normal_(self.pos, std=0.02)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = kept(self.keep, (height, width))
        scale = (height * width) ** 0.5
        z = (dct2(x, (rows, columns)) / scale).to(x.dtype).permute(0, 2, 3, 1) + self.pos[:rows, :columns]
        z = as_map(super().forward(z.flatten(1, 2)), (rows, columns))
        return (idct2(z, (height, width)) * scale).to(x.dtype)


class SpatialAttention2d(TransformerBlock):
    """Transformer block on the positions of the map, the baseline of `DCTAttention2d`: (B, dim, H, W) -> the same shape."""

    def __init__(self, dim: int):
        super().__init__(dim, dim // HEAD_DIM, mlp_ratio=2)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        z = super().forward(as_tokens(x))
        return as_map(z, (x.shape[2], x.shape[3]))


class MobileConv(nn.Module):
    """Inverted bottleneck with an expansion of four: (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_dim: int, dim: int, stride: int = 1):
        super().__init__()
        hidden = 4 * in_dim
        self.residual = stride == 1 and in_dim == dim
        self.expand = nn.Conv2d(in_dim, hidden, 1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(hidden)
        self.se = SqueezeExcite(hidden, max(1, in_dim // 4))
        self.project = nn.Conv2d(hidden, dim, 1, bias=False)
        self.norm3: nn.Module = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.expand(x)))
        y = self.norm3(self.project(self.se(F.silu(self.norm2(self.dwconv(y))))))
        return x + y if self.residual else y

    def fold(self) -> None:
        """Fold the norms into the preceding convolutions."""
        for conv, norm in (("expand", "norm1"), ("dwconv", "norm2"), ("project", "norm3")):
            fold_pair(self, conv, norm)


class DCTConvBlock(nn.Module):
    """DCT attention and inverted bottleneck in parallel: (B, dim, H, W) -> the same shape."""

    def __init__(self, dim: int, keep: int, attention: str):
        super().__init__()
        self.dct = {"dct": lambda: DCTAttention2d(dim, keep), "spatial": lambda: SpatialAttention2d(dim), "none": lambda: None}[attention]()
        self.conv = MobileConv(dim, dim)
        self.fuse = ConvNorm(dim if self.dct is None else 2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + self.fuse(y if self.dct is None else torch.cat([self.dct(x), y], 1))


@family(
    "dct_histo",
    variants={
        "pico": dict(depths=(1, 1), dims=(32, 48), keeps=(4, 4), strides=(1, 2), stem_dim=16, drop_rate=0.0, image_size=16),
        "base": dict(),  # 96.0 % on BreakHis benign or malignant, 87.9 % on its eight classes
    },
    official=rename(),  # no names were published
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
class DCTHistoTransformer(Backbone):
    """DCT-HistoTransformer classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        depths, dims: blocks and channels per stage; channels are multiples of 16, the width of a head.
        keeps: kept frequencies k per side in the attention of each stage.
        strides: stride of each stage, after a stem of stride 2.
        stem_dim: channels of the stem.
        attention: "dct"; for comparison "spatial" (between the positions of the map) or "none".
        drop_rate: dropout before the head.

    Raises:
        ValueError: lists of different lengths, channels that are not a multiple of 16, or another attention.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 2, 2, 1),
        dims: Sequence[int] = (48, 96, 160, 224),
        keeps: Sequence[int] = (14, 14, 7, 7),
        strides: Sequence[int] = (2, 2, 2, 2),
        stem_dim: int = 32,
        attention: str = "dct",
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.2,
    ):
        if not len(depths) == len(dims) == len(keeps) == len(strides):
            raise ValueError(f"depths, dims, keeps and strides need one value per stage, got {depths}, {dims}, {keeps} and {strides}")
        if wrong := [dim for dim in dims if dim % HEAD_DIM]:
            raise ValueError(f"dims must be multiples of {HEAD_DIM}, the width of a head, got {wrong[0]}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        reductions = [2 * int(torch.Size(strides[: k + 1]).numel()) for k in range(len(dims))]
        stages = [Stage(dim, reduction) for dim, reduction in zip(dims, reductions, strict=True)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.stem = ConvNorm(in_chans, stem_dim, 3, 2)
        self.stages = nn.ModuleList(
            PyramidStage(
                MobileConv(dims[k - 1] if k else stem_dim, dims[k], strides[k]),
                [DCTConvBlock(dims[k], keeps[k], attention) for _ in range(depths[k])],
            )
            for k in range(len(dims))
        )
        self.head_norm = nn.LayerNorm(dims[-1])
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = F.silu(self.stem(image.contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("dct.pos")}
