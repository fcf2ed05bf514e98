"""DCT-HistoTransformer: attention between the low frequencies of a map, beside a convolution (2024, for pictures of tissue).

The idea: a network for few pictures and small machines. In each block one path takes the cosine transform of the map, keeps its k x k
lowest frequencies, lets them attend to one another and transforms back: global context by few tokens, a quarter of all at k = H / 2. The
fine detail, which is lost there, goes through an inverted bottleneck on the map itself; a 1 x 1 convolution joins the two.

    z = DCT(x)[:k, :k] / sqrt(H W) + p;  z <- z + Attention(LN(z));  z <- z + MLP(LN(z));  low = DCT^-1(sqrt(H W) z, zeros elsewhere)
    x <- x + BN(W [low, MobileConv(x)]),  p one vector a frequency

No code and no weights were published; what the paper does not say (sizes, where the transform stands, how the paths join) was chosen.
Any image size: k stays, so that the attention costs the same; a map smaller than k keeps all frequencies that it has.
Cost: linear in area but for the transform, area times k.

How it is fast: the transform is two matrix products that form only the coefficients that are kept; `fuse()` folds all batch norms.

Legend: B batch, C channels, H W map, k frequencies that are kept a side.
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
    """An ideal low-pass filter: (B, C, H, W) -> the same, of only the `keep` x `keep` lowest frequencies."""

    def __init__(self, keep: int):
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        return idct2(dct2(x, kept(self.keep, size)), size).to(x.dtype)

    @torch.no_grad()
    def energy_share(self, x: Tensor) -> Tensor:
        """How much of a map's sum of squares passes, from 0 to 1: (B, C, H, W) -> (B, C)."""
        passed = dct2(x, kept(self.keep, (x.shape[-2], x.shape[-1]))).square().sum((2, 3))
        return passed / x.to(passed.dtype).square().sum((2, 3)).clamp_min(torch.finfo(passed.dtype).tiny)


def kept(keep: int, size: tuple[int, int]) -> tuple[int, int]:
    """Frequencies that a map of that size keeps."""
    return min(keep, size[0]), min(keep, size[1])


class DCTAttention2d(TransformerBlock):
    """Attention and MLP between the lowest frequencies: (B, dim, H, W) -> the same, without frequencies above them.

    Args:
        dim: channels, a multiple of 16, the width of a head.
        keep: frequencies k a side.
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
    """The same between the places of the map, which the claim compares with: (B, dim, H, W) -> the same."""

    def __init__(self, dim: int):
        super().__init__(dim, dim // HEAD_DIM, mlp_ratio=2)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        z = super().forward(as_tokens(x))
        return as_map(z, (x.shape[2], x.shape[3]))


class MobileConv(nn.Module):
    """Inverted bottleneck, four times as wide inside: (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

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
        """The norms go into the convolutions before them."""
        for conv, norm in (("expand", "norm1"), ("dwconv", "norm2"), ("project", "norm3")):
            fold_pair(self, conv, norm)


class DCTConvBlock(nn.Module):
    """(B, dim, H, W) -> the same."""

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
    """Image (B, in_chans, H, W), any H and W -> logits (B, num_classes).

    Args:
        depths, dims: blocks and channels a stage; channels are multiples of 16, the width of a head.
        keeps: frequencies k a side that a stage's attention sees.
        strides: of each stage, behind a stem of stride 2.
        stem_dim: channels of the stem.
        attention: "dct"; "spatial" between the places of the map, or "none", to compare with.
        drop_rate: dropout before the head.

    Raises:
        ValueError: lists of different lengths, channels that are no multiple of 16, or another attention.
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
            raise ValueError(f"depths, dims, keeps and strides need one value a stage, got {depths}, {dims}, {keeps} and {strides}")
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
