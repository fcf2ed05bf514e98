"""TiC: sliding-window self-attention as a convolution (Zhang et al., "TiC: Exploring Vision Transformer in Convolution").

The idea: each position attends to the k x k positions around it. An attention network then accepts any image size like a CNN, without a
position table and at a cost linear in pixels. Two mechanisms extend the receptive field beyond the windows.

    MSA-Conv   y_p = x_p + sum_o softmax_o(q_p . k_{p + o} / sqrt(d)) v_{p + o};  out = ReLU(Conv_k,stride s(y))
    TiC block  x <- x + W MSA(LN(x));  x <- x + MLP(LN(x)), without positions
    shifts     before that, keys and values of each quarter (or eighth) of the channels are rolled by s in one of 4 (8) directions; s grows
               as floor(k / 2) (1, 2, 4, ...) with the blocks of a stage, up to half the map, so that a query attends to another window
    pooling    [k v] <- [k v] + sum_r c_r up_r(mean_r x r [k v]), r = 2, 4, with learned c_r per channel, initially zero

Positions outside the map have zero keys and values: they take part in the softmax with logit 0, which gives information about the border.
`MSAConv2d` follows the authors' layer (github zs670980918/MSA-Conv), whose weights load by name, with its single head. Their network was
not released: the block, the two mechanisms and the sizes of TiC are this library's interpretation of the abstract.
Cost: linear in image area at fixed k.

Speed: nothing is unfolded k^2 times. The map is split into tiles of about k x k queries; each is processed by the fused kernel with the
(2k - 1)^2 keys and values around it, under one mask for all tiles.

Legend: B batch, C channels, H W map, T tiles of n queries and m keys, d channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import (
    Backbone,
    Conv2d,
    ConvNorm,
    DropPath,
    LayerNorm2d,
    LayoutCache,
    Linear,
    Mlp,
    PyramidStage,
    Stage,
    drop_path_rates,
    init_convs_by_fan_out,
    init_weights,
)
from vitarium.ops.attention import merge_heads, split_heads, split_packed_heads

Pair = tuple[int, int]
DIRECTIONS: tuple[Pair, ...] = ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
"""Rows and columns: left, right, up, down, and the diagonals."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """Split of a map into tiles of queries with the surrounding keys. With dilation, each residue class of positions is a separate map.

    Attributes:
        kernel_size: rows and columns of a window, odd.
        dilation: distance between the positions of a window.
        count, size: number of tiles of one map, and of queries of a tile, rows and columns each.
        bias: (1 or dilation^2 T, 1, n, m) float32; 0 where a query attends to a key, -inf elsewhere.
    """

    kernel_size: Pair
    dilation: int
    count: Pair
    size: Pair
    bias: Tensor

    @classmethod
    def of(
        cls,
        height: int,
        width: int,
        kernel_size: Pair,
        dilation: int = 1,
        *,
        masked: bool = False,
        device: torch.device | None = None,
    ) -> Tiling:
        """Build the tiling of a map; `masked` excludes positions outside the map from the softmax."""
        lengths = -(-height // dilation), -(-width // dilation)
        count = (-(-lengths[0] // max(4, kernel_size[0])), -(-lengths[1] // max(4, kernel_size[1])))
        size = -(-lengths[0] // count[0]), -(-lengths[1] // count[1])
        lags = [
            torch.arange(t + k - 1, device=device) - torch.arange(t, device=device)[:, None] for t, k in zip(size, kernel_size, strict=True)
        ]
        rows, columns = ((lag >= 0) & (lag < k) for lag, k in zip(lags, kernel_size, strict=True))
        seen = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)[None]
        if masked:
            phase = torch.arange(dilation, device=device)[:, None, None]

            def on_map(margins: Pair) -> Tensor:
                """Return which positions of a tile with margins on both sides are on the map, (dilation^2 T, positions)."""
                sides = []
                for side, t, number, margin in zip((height, width), size, count, margins, strict=True):
                    start = t * torch.arange(number, device=device)[:, None] - margin
                    place = phase + dilation * (start + torch.arange(t + 2 * margin, device=device))
                    sides.append((place >= 0) & (place < side))
                both = sides[0][:, None, :, None, :, None] & sides[1][None, :, None, :, None, :]
                return both.flatten(4).flatten(0, 3)

            real, own = on_map((kernel_size[0] // 2, kernel_size[1] // 2)), on_map((0, 0))
            seen = seen & (real[:, None] | ~own[:, :, None])  # queries outside the map are discarded but need a key
        return cls(kernel_size, dilation, count, size, torch.where(seen, 0.0, -math.inf)[:, None].contiguous())

    def apart(self, x: Tensor) -> Tensor:
        """Split a map by residue class and pad it to whole tiles: (B, H, W, C) -> (B dilation^2, H', W', C)."""
        (batch, height, width, dim), d = x.shape, self.dilation
        rows, columns = self.count[0] * self.size[0], self.count[1] * self.size[1]
        if (rows * d, columns * d) != (height, width):
            x = F.pad(x, (0, 0, 0, columns * d - width, 0, rows * d - height))
        if d == 1:
            return x
        return x.reshape(batch, rows, d, columns, d, dim).permute(0, 2, 4, 1, 3, 5).reshape(batch * d * d, rows, columns, dim)

    def queries(self, x: Tensor) -> Tensor:
        """Return the positions of each tile: (B, H, W, C) -> (B dilation^2 T, n, C)."""
        x = self.apart(x)
        (batch, _, _, dim), (down, across), (rows, columns) = x.shape, self.count, self.size
        x = x.reshape(batch, down, rows, across, columns, dim).transpose(2, 3)
        return x.reshape(batch * down * across, rows * columns, dim)

    def keys(self, x: Tensor) -> Tensor:
        """Return the positions of each tile with its surroundings, zeros outside the map: (B, H, W, C) -> (B dilation^2 T, m, C)."""
        x = self.apart(x)
        batch, dim, margins = x.shape[0], x.shape[3], [side // 2 for side in self.kernel_size]
        x = F.pad(x, (0, 0, margins[1], margins[1], margins[0], margins[0]))
        reach = self.size[0] + 2 * margins[0], self.size[1] + 2 * margins[1]
        x = x.unfold(1, reach[0], self.size[0]).unfold(2, reach[1], self.size[1]).permute(0, 1, 2, 4, 5, 3)
        return x.reshape(batch * self.count[0] * self.count[1], reach[0] * reach[1], dim)

    def together(self, y: Tensor, height: int, width: int) -> Tensor:
        """Reverse `queries`: (B dilation^2 T, n, C) -> (B, H, W, C)."""
        (down, across), (rows, columns), d, dim = self.count, self.size, self.dilation, y.shape[-1]
        batch = y.shape[0] // (down * across)
        y = y.reshape(batch, down, across, rows, columns, dim).transpose(2, 3)
        if d == 1:
            return y.reshape(batch, down * rows, across * columns, dim)[:, :height, :width]
        y = y.reshape(batch // (d * d), d, d, down * rows, across * columns, dim).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(batch // (d * d), down * rows * d, across * columns * d, dim)[:, :height, :width]


def neighbour_attention(q: Tensor, kv: Tensor, num_heads: int, tiling: Tiling, *, dropout: float = 0.0) -> Tensor:
    """Compute sliding-window attention of queries (B, H, W, C) and keys and values [k | v] (B, H, W, 2C): (B, H, W, C).

    Args:
        q, kv: maps, channels last; C is divisible by num_heads.
        num_heads: heads.
        tiling: tiling of the map.
        dropout: dropout rate of the attention weights.
    """
    batch, height, width, _ = q.shape
    queries = split_heads(tiling.queries(q), num_heads)
    keys, values = split_packed_heads(tiling.keys(kv), 2, num_heads)
    bias = tiling.bias.to(q.dtype)
    bias = bias if len(bias) == 1 else bias.repeat(batch, 1, 1, 1)
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout)
    return tiling.together(merge_heads(y), height, width)


def neighbour_weights(q: Tensor, k: Tensor, num_heads: int, kernel_size: Pair, dilation: int = 1) -> Tensor:
    """Return the weights of `neighbour_attention` without mask and shifts: maps (B, C, H, W) -> (B, heads, k k, H, W).

    The neighbours of a position are ordered row by row. For visualisation and tests: the keys are copied k k times.
    """
    batch, dim, height, width = q.shape
    padding = (dilation * (kernel_size[0] // 2), dilation * (kernel_size[1] // 2))
    keys = F.unfold(k, kernel_size, dilation, padding).view(batch, num_heads, dim // num_heads, math.prod(kernel_size), height, width)
    queries = q.view(batch, num_heads, dim // num_heads, 1, height, width) * (dim // num_heads) ** -0.5
    return (queries * keys).sum(2).softmax(2)


class MSAConv2d(nn.Module):
    """The authors' MSA-Conv layer, a replacement for a convolution: (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).

    Args:
        in_channels, out_channels: channels.
        kernel_size: side of the window, or rows and columns; odd. The convolution after the attention has the same size.
        stride: of that convolution.
        padding: of that convolution; None keeps the size at stride 1 (1 for 3 x 3, as in the authors' code).
        dilation: of the attention.
        num_heads: 1 as released; in_channels for attention in each channel ("depth-wise").
        mask_padding: exclude positions outside the map from the softmax; as released, they take part with logit 0.
        attn_drop: dropout rate of the attention weights.

    Raises:
        ValueError: an even kernel, a dilation below 1, or in_channels that are not divisible by num_heads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int = 1,
        padding: int | Pair | None = None,
        dilation: int = 1,
        *,
        num_heads: int = 1,
        mask_padding: bool = False,
        attn_drop: float = 0.1,
    ):
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else (kernel_size[0], kernel_size[1])
        if min(kernel) < 1 or not kernel[0] % 2 or not kernel[1] % 2:
            raise ValueError(f"kernel_size must be odd, so that a window has a centre; got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        if num_heads < 1 or in_channels % num_heads:
            raise ValueError(f"in_channels must be divisible by num_heads, got {in_channels} and {num_heads}")
        super().__init__()
        self.kernel_size, self.dilation, self.num_heads = kernel, dilation, num_heads
        self.mask_padding, self.attn_drop = mask_padding, attn_drop
        self.qkv_conv = nn.Conv2d(in_channels, 3 * in_channels, 1)
        self.mlp = nn.Conv2d(
            in_channels, out_channels, kernel, stride, (kernel[0] // 2, kernel[1] // 2) if padding is None else padding, bias=False
        )
        self.kept = LayoutCache()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mlp(self.attend(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Apply the residual attention: (B, in_channels, H, W) -> the same shape."""
        height, width = x.shape[-2:]
        build = lambda: Tiling.of(height, width, self.kernel_size, self.dilation, masked=self.mask_padding, device=x.device)
        tiling = self.kept.get(height, width, x.device, build)
        q, kv = self.qkv_conv(x).permute(0, 2, 3, 1).split([x.shape[1], 2 * x.shape[1]], 3)
        y = neighbour_attention(q, kv, self.num_heads, tiling, dropout=self.attn_drop if self.training else 0.0)
        return x + y.permute(0, 3, 1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights, with padding at logit 0, for visualisation: (B, in_channels, H, W) -> (B, heads, k k, H, W)."""
        q, k, _ = self.qkv_conv(x).chunk(3, 1)
        return neighbour_weights(q, k, self.num_heads, self.kernel_size, self.dilation)


class NeighbourAttention(nn.Module):
    """Sliding-window attention with directional shifts and pooling: (B, H, W, dim) -> the same shape.

    Args:
        dim, num_heads: channels and heads.
        kernel_size: side of the window.
        shift: distance by which keys and values are rolled, limited to half the map.
        directions: 4, or 8 with the diagonals; 0: no shifts.
        pools: sides r of the means that are added to keys and values; empty: no pooling.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, *, shift: int, directions: int, pools: Sequence[int]):
        super().__init__()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.shift, self.directions, self.pools = shift, directions, tuple(pools)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.pool_scales = nn.Parameter(torch.zeros(len(pools), 2 * dim)) if pools else None
        self.kept = LayoutCache()

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        q, kv = self.qkv(x).split([dim, 2 * dim], -1)
        kernel = (self.kernel_size, self.kernel_size)
        tiling = self.kept.get(height, width, x.device, lambda: Tiling.of(height, width, kernel, device=x.device))
        return self.proj(neighbour_attention(q, self.rolled(self.with_means(kv)), self.num_heads, tiling))

    def rolled(self, kv: Tensor) -> Tensor:
        """Roll each group of channels of keys and values in its direction: (B, H, W, 2 dim) -> the same shape."""
        if not self.directions:
            return kv
        down, right = min(self.shift, kv.shape[1] // 2), min(self.shift, kv.shape[2] // 2)
        parts = kv.chunk(2 * self.directions, -1)
        ways = 2 * DIRECTIONS[: self.directions]
        return torch.cat([part.roll((down * dy, right * dx), (1, 2)) for part, (dy, dx) in zip(parts, ways, strict=True)], -1)

    def with_means(self, kv: Tensor) -> Tensor:
        """Add the pooled maps to keys and values: (B, H, W, 2 dim) -> the same shape."""
        if self.pool_scales is None:
            return kv
        height, width = kv.shape[1:3]
        image, out = kv.permute(0, 3, 1, 2), kv
        for r, scale in zip(self.pools, self.pool_scales, strict=True):
            means = F.avg_pool2d(image, r, ceil_mode=True)
            spread = F.interpolate(means, scale_factor=float(r), mode="nearest")[:, :, :height, :width]
            out = torch.addcmul(out, spread.permute(0, 2, 3, 1), scale)
        return out


class TiCBlock(nn.Module):
    """TiC block: (B, dim, H, W) -> the same shape, channels-last in memory."""

    def __init__(self, dim: int, attn: NeighbourAttention, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Downsample(ConvNorm):
    """Strided 2 x 2 convolution and batch norm, with zero padding of odd maps: (B, C_in, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(in_dim, dim, 2, 2, padding=0, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = x.shape[2] % 2, x.shape[3] % 2
        return super().forward(F.pad(x, (0, right, 0, bottom)) if bottom or right else x)


class Stem(nn.Module):
    """Two 3 x 3 convolutions with a batch norm and GELU between them: (B, in_chans, H, W) -> (B, dim, h, w)."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int]):
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, strides[0], bias=True)
        self.conv2 = Conv2d(dim // 2, dim, 3, strides[1], 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv2(self.conv1.activated(image))


_SIZES = dict(dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16))


@family(
    "tic",
    variants={
        "pico": dict(dims=(32, 64), depths=(1, 2), num_heads=(2, 4), kernel_size=3, mlp_ratio=3, stem_strides=(2, 1), image_size=16),
        "tiny": dict(**_SIZES, depths=(2, 2, 6, 2), drop_path_rate=0.2),  # 12.8 M; sizes are this library's
        "small": dict(**_SIZES, depths=(2, 2, 18, 2), drop_path_rate=0.3),  # 22.3 M
    },
    official=rename(),  # no network was released; the names are this library's
)
class TiC(Backbone):
    """TiC classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        dims, depths, num_heads: channels, blocks and heads per stage.
        kernel_size: side k of the windows, odd.
        directions: number of directions of the shifts of keys and values, 4 or 8; 0 for no shifts.
        pools: sides of the means that are added to keys and values, positions; () for no pooling.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels.
        stem_strides: strides of the two convolutions of the stem.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, an even kernel, other directions, pools below 2, or dims that are not divisible by heads or
            directions.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        kernel_size: int = 7,
        directions: int = 4,
        pools: Sequence[int] = (2, 4),
        mlp_ratio: float = 4.0,
        stem_strides: Sequence[int] = (2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims, depths and num_heads need one value per stage, got {dims}, {depths} and {num_heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a window has a centre; got {kernel_size}")
        if directions not in (0, 4, 8):
            raise ValueError(f"directions must be 4 or 8, or 0 for no shifts; got {directions}")
        if min(pools, default=2) < 2:
            raise ValueError(f"pools must be sides of at least 2 positions, or () for none; got {tuple(pools)}")
        if wrong := [(dim, heads) for dim, heads in zip(dims, num_heads, strict=True) if dim % heads or dim % max(1, directions)]:
            raise ValueError(
                f"dims must be divisible by num_heads and by directions={directions}, got {wrong[0][0]} with {wrong[0][1]} heads"
            )
        stages = [Stage(dim, stem_strides[0] * stem_strides[1] * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        rates = drop_path_rates(drop_path_rate, depths)
        attention = lambda k, i: NeighbourAttention(
            dims[k], num_heads[k], kernel_size, shift=kernel_size // 2 * 2**i, directions=directions, pools=pools
        )
        self.stages = nn.ModuleList(
            PyramidStage(
                Downsample(dims[k - 1], dims[k]) if k else Stem(in_chans, dims[0], stem_strides),
                [TiCBlock(dims[k], attention(k, i), mlp_ratio, rate) for i, rate in enumerate(rates[k])],
            )
            for k in range(len(dims))
        )
        self.norm = LayerNorm2d(dims[-1])
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)

    @torch.enable_grad()
    def receptive_field(self, image: Tensor, stage: int = -1) -> Tensor:
        """Return the gradient magnitude of the centre cell of a stage with respect to each pixel: (B, in_chans, H, W) -> (B, H, W).

        Scaled to a maximum of 1; for visualisation.

        Raises:
            InputError: no such stage.
        """
        image = image.detach().clone().requires_grad_()
        features = self.forward_intermediates(image, [stage], stop_early=True, intermediates_only=True)[0]
        height, width = features.shape[-2:]
        middle = features[:, :, height // 2, width // 2]
        (gradient,) = torch.autograd.grad(middle.sum(), image)
        strength = gradient.abs().sum(1)
        return strength / strength.amax((1, 2), keepdim=True).clamp(min=torch.finfo(strength.dtype).tiny)
