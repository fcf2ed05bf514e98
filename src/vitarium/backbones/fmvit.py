"""FMViT: attention for low frequencies, convolutions for high ones, re-parameterised for inference (Tan et al., "FMViT", 2023).

The idea: attention acts as a low-pass filter, convolutions as high-pass filters. In a multi-frequency fusion block (FMB), three quarters of
the channels come from a light attention to a pooled map; the others from grouped convolutions with two dilations and from the difference
between the input and its 2 x 2 means. Other blocks (CFB) are purely convolutional. Nearly every layer is trained as a sum of parallel
convolutions with batch norms, which `fuse()` merges into one.

    CFB  x <- x + W ReLU(BN(conv_3x3,groups x));  x <- x + gMLP(BN x)
    FMB  t = W_t x;  low = t + Attention(BN t);  h = W_h low
         high = conv(h) + conv_dilation 2(h) + W_r (x - up(mean_2x2 x));  y = [low | high];  y <- y + gMLP(BN y)
    Attention(z)  q = W_q z; k, v = W mean_sxs(z);  W_o (softmax(q k^T / 4) v + up(DW_3x3 v)),  16 channels per head in q and k, 32 in v
    gMLP  each of its two 1 x 1 layers is a sum of convolutions in 1, 2 and 4 groups

The authors (github tany0699/FMViT) did not release code or sizes: components and accuracies are the paper's; the equations above, widths
and depths are this library's choice and match the paper's parameters and MACs. Any image size.
Cost: quadratic in image area, divided by s^2 (s = 8, 4, 2, 1 in the four stages).

Speed: `fuse()` merges all parallel branches and all batch norms except the last; maps are channels-last in memory, so that tokens and maps
share their memory.

Legend: B batch, C channels, H W map, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import Backbone, DropPath, PyramidStage, Stage, drop_path_rates, fold_norm_after, fold_norm_before, init_weights
from vitarium.nn.reparam import RepConv, rep_conv
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens

HEAD_DIM = 32
"""Channels of the values of a head and of a group of a 3 x 3 convolution; queries and keys have half as many."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def pooled(x: Tensor, size: int) -> Tensor:
    """Average size x size cells, at the border over the existing pixels: (B, C, H, W) -> (B, C, ceil(H / size), ceil(W / size))."""
    return F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False) if size > 1 else x


def spread(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """Repeat each cell over size x size pixels and crop to height x width."""
    return F.interpolate(x, scale_factor=size, mode="nearest")[:, :, :height, :width] if size > 1 else x


class FoldedInput(nn.Module):
    """Base of modules that begin with a batch norm read only by 1 x 1 layers, into which `fold` folds it."""

    norm: nn.Module

    def readers(self) -> list[RepConv]:
        """Return the layers that read the norm; no other layer may read it."""
        raise NotImplementedError(f"{type(self).__name__} does not define readers")

    def fold(self) -> None:
        """Fold the readers, then the norm into them."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        for reader in self.readers():
            reader.fold()
            assert reader.conv is not None
            reader.conv = fold_norm_before(self.norm, reader.conv)
        self.norm = nn.Identity()


class GroupMlp(FoldedInput):
    """Batch norm and an MLP whose 1 x 1 layers are sums of grouped convolutions (gMLP): (B, C, H, W) -> the same shape.

    Args:
        dim: channels.
        ratio: ratio of hidden channels to dim.
        groups: numbers of groups of the convolutions that are summed.
        act: activation, see ACTIVATIONS.
    """

    def __init__(self, dim: int, ratio: int, groups: Sequence[int], act: str):
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.fc1 = RepConv(dim, ratio * dim, [(1, g) for g in groups])
        self.act = ACTIVATIONS[act]()
        self.fc2 = RepConv(ratio * dim, dim, [(1, g) for g in groups])

    def readers(self) -> list[RepConv]:
        return [self.fc1]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm(x))))


class LightAttention(FoldedInput):
    """Batch norm and attention from all positions to a pooled map: (B, C, H, W) -> the same shape.

    Args:
        dim: channels, a multiple of 32.
        pool_size: side s of the cells over which the input of keys and values is averaged.
    """

    def __init__(self, dim: int, pool_size: int):
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.pool_size = pool_size
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.q = rep_conv(dim, dim // 2, 1)
        self.k = rep_conv(dim, dim // 2, 1)
        self.v = rep_conv(dim, dim, 1)
        self.local = rep_conv(dim, dim, 3, groups=dim)
        self.proj = rep_conv(dim, dim, 1)

    def readers(self) -> list[RepConv]:
        return [self.q, self.k, self.v]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = self.norm(x)
        coarse = pooled(x, self.pool_size)
        values = self.v(coarse)
        q, k, v = as_tokens(self.q(x)), as_tokens(self.k(coarse)), as_tokens(values)
        y = as_map(multi_head_attention(q, k, v, self.num_heads), (height, width))
        return self.proj(y + spread(self.local(values), self.pool_size, height, width))


class ConvMixer(nn.Module):
    """Grouped 3 x 3 convolution (32 channels per group), batch norm, ReLU, 1 x 1 convolution: (B, C, H, W) -> the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = rep_conv(dim, dim, 3, groups=dim // HEAD_DIM)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.norm(self.conv(x))))

    def fold(self) -> None:
        """Fold the norm into the merged convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv.fold()
            assert self.conv.conv is not None
            self.conv.conv, self.norm = fold_norm_after(self.conv.conv, self.norm), nn.Identity()


class ConvFusionBlock(nn.Module):
    """Convolutional block, CFB in the module's docstring: (B, C, H, W) -> the same shape."""

    def __init__(self, dim: int, ratio: int, groups: Sequence[int], act: str, drop_path: float):
        super().__init__()
        self.mixer = ConvMixer(dim)
        self.mlp = GroupMlp(dim, ratio, groups, act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(x))


class FrequencyFusionBlock(nn.Module):
    """Multi-frequency fusion block, FMB in the module's docstring: (B, C, H, W) -> the same shape.

    Args:
        dim: channels, a multiple of 32.
        low_dim: channels of the attention branch; 0 for no attention (the convolutions then read x), dim for no convolutions.
        pool_size: see `LightAttention`.
        ratio, groups, act: see `GroupMlp`.
        drop_path: stochastic depth rate of attention and MLP.
    """

    def __init__(self, dim: int, low_dim: int, pool_size: int, ratio: int, groups: Sequence[int], act: str, drop_path: float):
        super().__init__()
        self.low_dim, high = low_dim, dim - low_dim
        if low_dim:
            self.reduce = rep_conv(dim, low_dim, 1)
            self.attn = LightAttention(low_dim, pool_size)
        if high:
            self.to_high = rep_conv(low_dim or dim, high, 1)
            self.near = rep_conv(high, high, 3, groups=high // HEAD_DIM)
            self.far = rep_conv(high, high, 3, groups=high // HEAD_DIM, dilation=2)
            self.residue = rep_conv(dim, high, 1)
        self.high_dim = high
        self.mlp = GroupMlp(dim, ratio, groups, act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        source = x
        if self.low_dim:
            source = self.reduce(x)
            source = source + self.drop_path(self.attn(source))
            parts.append(source)
        if self.high_dim:
            h = self.to_high(source)
            band = x - spread(pooled(x, 2), 2, *x.shape[-2:])
            parts.append(self.near(h) + self.far(h) + self.residue(band))
        y = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return y + self.drop_path(self.mlp(y))


class Downsample(nn.Module):
    """Average pooling by `stride` and a 1 x 1 convolution: (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_dim: int, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = rep_conv(in_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pooled(x, self.stride))


def order_of_blocks(convolutions: int, fusions: int) -> list[bool]:
    """Return for each block of a stage whether it is an FMB: the CFBs are split evenly, with an FMB after each run of them.

    For example, (6, 2) gives CFB CFB CFB FMB CFB CFB CFB FMB.
    """
    if not fusions:
        return [False] * convolutions
    runs = [convolutions // fusions + (i < convolutions % fusions) for i in range(fusions)]
    return [kind for run in runs for kind in (*[False] * run, True)]


@family(
    "fmvit",
    variants={
        "pico": dict(dims=(32, 64), convolutions=(1, 1), fusions=(0, 1), stem_dims=(16, 32), stem_strides=(2, 1), image_size=16),
        "micro": dict(dims=(32, 64), convolutions=(1, 1), fusions=(0, 1), stem_dims=(16, 32), stem_strides=(2, 2), image_size=28),
        # the paper's accuracies, this library's sizes
        "t": dict(dims=(32, 64, 160, 256), convolutions=(1, 1, 2, 1), fusions=(0, 1, 1, 1), stem_dims=(16, 32)),  # 2.0 M, 72.9 %
        "s": dict(dims=(32, 96, 256, 512), convolutions=(2, 2, 2, 1), fusions=(0, 1, 1, 1), stem_dims=(16, 32)),  # 6.3 M, 78.5 %
        "m": dict(
            dims=(64, 96, 320, 640), convolutions=(2, 2, 6, 1), fusions=(0, 1, 2, 1), stem_dims=(32, 64), drop_path_rate=0.1
        ),  # 80.3 %
        "b": dict(
            dims=(96, 192, 384, 768), convolutions=(3, 3, 8, 2), fusions=(0, 1, 2, 1), stem_dims=(32, 64), drop_path_rate=0.1
        ),  # 82.4 %
        "l": dict(
            dims=(128, 256, 512, 768), convolutions=(3, 3, 10, 2), fusions=(0, 1, 2, 1), stem_dims=(32, 64), drop_path_rate=0.2
        ),  # 83.3 %
    },
    official=rename(),  # no weights were released; the names are this library's
)
class FMViT(Backbone):
    """FMViT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        dims: channels per stage, multiples of 32.
        convolutions, fusions: number of CFBs and of FMBs per stage.
        stem_dims: channels of the three convolutions of the stem: those of the first two, and of the last.
        stem_strides: strides of the first and the last of them.
        pool_sizes: pooling of the attention per stage, see `LightAttention`; by default 1 in the last stage, doubled in each earlier one.
        low_share: share of the channels of an FMB that come from attention, rounded down to a multiple of 32, at least 32; 0 for none and 1
            for all.
        mlp_ratios: ratios of the MLPs' hidden channels to the channels, in CFBs and in FMBs.
        mlp_groups: see `GroupMlp`; (1,) for plain layers.
        act: activation of the MLPs, "gelu" or "relu".
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, dims that are not multiples of 32, a share outside [0, 1], an unknown activation.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        convolutions: Sequence[int],
        fusions: Sequence[int],
        stem_dims: tuple[int, int],
        stem_strides: tuple[int, int] = (2, 2),
        pool_sizes: Sequence[int] | None = None,
        low_share: float = 0.75,
        mlp_ratios: tuple[int, int] = (2, 3),
        mlp_groups: Sequence[int] = (1, 2, 4),
        act: str = "gelu",
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        pool_sizes = pool_sizes or [2**k for k in reversed(range(len(dims)))]
        if not len(dims) == len(convolutions) == len(fusions) == len(pool_sizes):
            raise ValueError(
                f"dims, convolutions, fusions and pool_sizes need one value per stage, got {dims}, {convolutions}, {fusions}, {pool_sizes}"
            )
        if wrong := [dim for dim in dims if dim % HEAD_DIM]:
            raise ValueError(f"dims must be multiples of {HEAD_DIM}, the width of a head, got {wrong[0]}")
        if not 0 <= low_share <= 1:
            raise ValueError(f"low_share must lie in [0, 1], got {low_share}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        stride = stem_strides[0] * stem_strides[1]
        stages = [Stage(dim, stride * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        first, last = stem_dims
        self.stem = nn.Sequential(
            rep_conv(in_chans, first, 3, stride=stem_strides[0]),
            nn.ReLU(),
            rep_conv(first, first, 3),
            nn.ReLU(),
            rep_conv(first, last, 3, stride=stem_strides[1]),
            nn.ReLU(),
        )
        orders = [order_of_blocks(*counts) for counts in zip(convolutions, fusions, strict=True)]
        rates = drop_path_rates(drop_path_rate, [len(order) for order in orders])

        def block(k: int, fusion: bool, rate: float) -> nn.Module:
            dim = dims[k]
            if not fusion:
                return ConvFusionBlock(dim, mlp_ratios[0], mlp_groups, act, rate)
            low = max(HEAD_DIM, int(low_share * dim) // HEAD_DIM * HEAD_DIM) if low_share else 0
            return FrequencyFusionBlock(dim, low, pool_sizes[k], mlp_ratios[1], mlp_groups, act, rate)

        self.stages = nn.ModuleList(
            PyramidStage(
                Downsample(dims[k - 1] if k else last, dims[k], 2 if k else 1),
                [block(k, fusion, rate) for fusion, rate in zip(orders[k], rates[k], strict=True)],
            )
            for k in range(len(dims))
        )
        self.norm = nn.BatchNorm2d(dims[-1])
        init_weights(self)
