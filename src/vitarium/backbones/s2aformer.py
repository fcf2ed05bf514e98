"""S2AFormer: attention compressed in space and in channels (Xu et al., "S2AFormer: Strip Self-Attention", 2025).

The idea: attention costs N^2 pairs times C channels; both factors are reduced. Keys and values are computed from a map that is downsampled
by a strided depth-wise convolution; queries and keys have as few as one channel per head (a strip), while values keep their width.
Convolutions (LIM) preserve local detail.

    x <- x + DW(x);  x <- x + l1 SSA(LN x);  x <- x + l2 LIM(LN x);  x <- x + l3 MLP(LN x)
    SSA  x' = LN(DW_r,stride r(x));  q = W_q x, k = W_k x' (d channels per head), v = W_v x' (C / h);  W softmax(q k^T / sqrt(d)) v
    LIM  W_2 BN(DW GELU(W_1 BN(DW x)))

With d = 1 the logits of a head are an outer product of rank one, as in the paper; `qk_dim` sets another width.
No code was released. The order of a block and its layers are the paper's as reported by others; the details of SSA and LIM, widths and
depths are this library's choice and match the paper's parameters and MACs. Any image size: incomplete r x r cells at the border are padded
with zeros.
Cost: quadratic in image area; r^2 times fewer pairs and 2 C / (h d + C) times fewer products per pair than full attention.

Speed: maps are channels-last in memory, so norms, 1 x 1 layers and attention read them in place; `fuse()` folds the batch norms.

Legend: B batch, C channels, H W map, N = H W, h heads, d = qk_dim, r = sr_ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import (
    Backbone,
    Conv2d,
    ConvMlp,
    ConvNorm,
    DropPath,
    LayerNorm2d,
    PyramidStage,
    Stage,
    by_images,
    conv_norm_gelu,
    drop_path_rates,
    fold_pair,
    init_convs_by_fan_out,
    init_weights,
)
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens


class StripSelfAttention(nn.Module):
    """Strip self-attention (SSA in the module's docstring): (B, C, H, W) -> the same shape.

    Args:
        dim: channels C.
        num_heads: heads h; must divide dim.
        sr_ratio: reduction r of the sides of the map for keys and values.
        qk_dim: channels d of the queries and keys of a head; C / h is the usual width.
        pool: downsample by average pooling instead of a convolution.

    Raises:
        ValueError: dim is not divisible by num_heads.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qk_dim: int = 1, *, pool: bool = False):
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        if sr_ratio > 1:
            self.sr: nn.Module = nn.AvgPool2d(sr_ratio) if pool else nn.Conv2d(dim, dim, sr_ratio, sr_ratio, groups=dim)
            self.sr_norm = LayerNorm2d(dim, eps=1e-6)
        self.q = nn.Conv2d(dim, num_heads * qk_dim, 1)
        self.k = nn.Conv2d(dim, num_heads * qk_dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.reduce(x)
        q, k, v = as_tokens(self.q(x)), as_tokens(self.k(coarse)), as_tokens(self.v(coarse))
        return self.proj(as_map(multi_head_attention(q, k, v, self.num_heads), (x.shape[2], x.shape[3])))

    def reduce(self, x: Tensor) -> Tensor:
        """Downsample with zero padding at the right and the bottom: (B, C, H, W) -> (B, C, ceil(H / r), ceil(W / r))."""
        if self.sr_ratio == 1:
            return x
        bottom, right = (-side % self.sr_ratio for side in x.shape[-2:])
        return self.sr_norm(self.sr(F.pad(x, (0, right, 0, bottom)) if bottom or right else x))


class LocalInteraction(nn.Module):
    """Local interaction module (LIM in the module's docstring): (B, C, H, W) -> the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.dw1: nn.Conv2d = Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(dim)
        self.pw1 = Conv2d(dim, dim, 1)
        self.dw2: nn.Conv2d = Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(dim)
        self.pw2 = Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, self._interact, x, 4 * x.shape[1])  # four intermediate maps

    def _interact(self, x: Tensor) -> Tensor:
        return self.pw2(self.bn2(self.dw2(conv_norm_gelu(self.bn1(self.dw1(x)), self.pw1))))

    def fold(self) -> None:
        """Fold the norms into the depth-wise convolutions."""
        fold_pair(self, "dw1", "bn1")
        fold_pair(self, "dw2", "bn2")


class DepthwiseMlp(ConvMlp):
    """`ConvMlp` whose depth-wise convolution is called `dw`: (B, C, H, W) -> the same shape."""

    depthwise = "dw"


class HybridPerceptionBlock(nn.Module):
    """S2AFormer block: (B, C, H, W) -> the same shape, channels-last in memory.

    Args:
        dim, num_heads, sr_ratio, qk_dim, pool: see `StripSelfAttention`.
        attention, lim: whether the block has these branches.
        mlp_ratio: ratio of the MLP's hidden channels to dim.
        drop_path: stochastic depth rate of the last three branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        qk_dim: int,
        pool: bool,
        attention: bool,
        lim: bool,
        mlp_ratio: float,
        drop_path: float,
    ):
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        branches: dict[str, nn.Module] = {}
        if attention:
            branches["attn"] = StripSelfAttention(dim, num_heads, sr_ratio, qk_dim, pool=pool)
        if lim:
            branches["lim"] = LocalInteraction(dim)
        branches["mlp"] = DepthwiseMlp(dim, int(mlp_ratio * dim))
        self.branches = nn.ModuleDict(branches)
        self.norms = nn.ModuleDict({name: LayerNorm2d(dim, eps=1e-6) for name in branches})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.full((dim,), 1e-5)) for name in branches})
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dw(x)
        for name, branch in self.branches.items():
            x = x + self.drop_path(self.scales[name][:, None, None] * branch(self.norms[name](x)))
        return x


@family(
    "s2aformer",
    variants={
        "pico": dict(dims=(24, 48), depths=(1, 2), num_heads=(2, 4), sr_ratios=(2, 1), stem_stride=1, image_size=16),
        "micro": dict(dims=(24, 48), depths=(1, 2), num_heads=(2, 4), sr_ratios=(2, 1), stem_stride=2, image_size=28),
        # the paper's accuracies, this library's sizes
        "mini": dict(dims=(32, 64, 96, 384), depths=(1, 1, 2, 2)),  # 4.7 M, 75.1 % top-1
        "t": dict(dims=(40, 80, 120, 400), depths=(1, 1, 4, 2)),  # 5.7 M, 77.7 %
        "xs": dict(dims=(44, 88, 144, 416), depths=(1, 1, 4, 2)),  # 6.6 M, 78.9 %
        "s": dict(dims=(48, 96, 288, 480), depths=(1, 1, 3, 2)),  # 10.9 M, 80.8 %
        "m": dict(dims=(64, 128, 320, 512), depths=(3, 3, 9, 3)),  # 24.2 M, 82.3 %
    },
    official=rename(),  # no weights were released; the names are this library's
)
class S2AFormer(Backbone):
    """S2AFormer classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        dims, depths, num_heads, sr_ratios: channels, blocks, heads and reduction r per stage.
        qk_dim: see `StripSelfAttention`; None for the usual width of queries and keys, C / h.
        pool, attention, lim: see `HybridPerceptionBlock`.
        stem_stride: stride of the first convolution; each stage halves the resolution again.
        mlp_ratio: ratio of the MLP's hidden channels to channels.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, or dims that are not divisible by their num_heads.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 4, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qk_dim: int | None = 1,
        pool: bool = False,
        attention: bool = True,
        lim: bool = True,
        stem_stride: int = 2,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len({len(row) for row in (dims, depths, num_heads, sr_ratios)}) > 1:
            raise ValueError(
                f"dims, depths, num_heads and sr_ratios need one value per stage, got {dims}, {depths}, {num_heads}, {sr_ratios}"
            )
        stages = [Stage(dim, stem_stride * 2 ** (k + 1)) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        half = dims[0] // 2
        sides = [(in_chans, stem_stride), (half, 1), (half, 1)]
        self.stem = nn.Sequential(*(ConvNorm(before, half, 3, stride, act=nn.GELU) for before, stride in sides))
        rates = drop_path_rates(drop_path_rate, depths)

        def block(k: int, rate: float) -> nn.Module:
            strip = num_heads[k], sr_ratios[k], qk_dim or dims[k] // num_heads[k]
            return HybridPerceptionBlock(dims[k], *strip, pool, attention, lim, mlp_ratio, rate)

        self.stages = nn.ModuleList(
            PyramidStage(ConvNorm(dims[k - 1] if k else half, dims[k], 3, 2), [block(k, rate) for rate in rates[k]])
            for k in range(len(dims))
        )
        self.head_norm = nn.LayerNorm(dims[-1], eps=1e-6)
        init_weights(self)
        init_convs_by_fan_out(self, pointwise=False)
