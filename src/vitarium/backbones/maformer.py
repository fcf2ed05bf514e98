"""MAFormer: fusion of local and downsampled global features by attention (Wang et al., "MAFormer: Multi-scale Attention Fusion", 2022).

The idea: stages with large maps have two streams. One applies window attention; the other (global learning with down-sampling, GLD) mixes
all tokens into a few by a linear layer over the token axis. The local tokens then attend to the global tokens, instead of adding the two
streams. The deep stages have few tokens and are plain transformers.

    y = x + WindowAttention(LN x);  y = y + MLP(LN y);  G = W_N LN(x) + P, W_N of m = ceil(share N) rows
    x <- y + W_o softmax(W_q y (W_k G)^T / sqrt(C / h)) W_v G
    later stages: x <- x + DW x;  x <- x + Attention(LN x);  x <- x + MLP(LN x)

No code was released: block and fusion follow the equations in a later paper; widths, depths, position encoding (a depth-wise convolution of
the values) and shares are this library's choice. Any image size: windows are padded and the padding is masked; W_N and P are resampled.
Cost: m N C for GLD, 2 m N C for the fusion, linear in area for windows; quadratic for a fixed share.

Speed: tokens stay flat through a stage; windows are partitioned and reversed once per block; attention runs in the fused kernel; resampled
weights are cached in evaluation mode.

Legend: B batch, N tokens of a map, C channels, h heads, m global tokens, M window side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import (
    Attention,
    Backbone,
    DropPath,
    EvalCache,
    LayerNorm2d,
    Linear,
    Mlp,
    Stage,
    TransformerBlock,
    conv_patches,
    drop_path_rates,
    init_weights,
)
from vitarium.nn.positions import BILINEAR
from vitarium.ops.attention import merge_heads, multi_head_attention, split_packed_heads
from vitarium.ops.maps import as_map, as_tokens
from vitarium.ops.windows import pad_to_multiple, window_partition, window_reverse

Grid = tuple[int, int]
FUSIONS = ("cross", "add", "concat", "local", "global")


def resize_grid(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize a table with one row per cell to another grid, bilinear: (h w, C) -> (h' w', C)."""
    if old == new:
        return rows
    return BILINEAR(rows.T.unflatten(1, old)[None], new)[0].flatten(1).T


class LocalAttention(Attention):
    """Window attention plus a depth-wise 3 x 3 convolution of the values: (B, N, C) of a grid -> the same shape.

    Windows at the border are padded, and the padding is masked.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__(dim, num_heads)
        self.window_size = window_size
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        batch, _, dim = x.shape
        qkv = self.qkv(x).view(batch, *grid, 3 * dim)
        near = as_tokens(self.local(qkv[..., 2 * dim :].permute(0, 3, 1, 2)))
        padded = pad_to_multiple(qkv, self.window_size)
        height, width = padded.shape[1:3]
        windows = window_partition(padded, self.window_size)
        q, k, v = split_packed_heads(windows, 3, self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(batch, grid, (height, width), x))
        y = window_reverse(merge_heads(y), self.window_size, height, width)
        return self.proj(y[:, : grid[0], : grid[1]].flatten(1, 2) + near)

    def mask(self, batch: int, grid: Grid, padded: Grid, like: Tensor) -> Tensor | None:
        """Return a mask of the keys that are not padding, (B * windows, 1, 1, M^2), or None without padding."""
        if grid == padded:
            return None
        inside = F.pad(like.new_ones(1, *grid, 1), (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        return (window_partition(inside, self.window_size) > 0).transpose(1, 2)[:, None].repeat(batch, 1, 1, 1)


class GlobalTokens(nn.Module):
    """Global tokens by a linear layer over the token axis (GLD): (B, N, C) of a grid -> (B, m, C).

    Args:
        dim: channels.
        grid: rows and columns that the layer is made for; for others its weight is resampled on both axes, with unchanged row sums.
        share: ratio of global tokens to tokens; the sides of their grid are those of the map times its root, rounded up.
    """

    def __init__(self, dim: int, grid: Grid, share: float):
        super().__init__()
        self.share, self.made_for = share, (grid, self.coarse(grid, share))
        fine, few = self.made_for[0], self.made_for[1]
        self.weight = nn.Parameter(torch.empty(few[0] * few[1], fine[0] * fine[1]))
        self.positions = nn.Parameter(torch.empty(few[0] * few[1], dim))
        self.cache = EvalCache()
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.trunc_normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.weight.add_(nearest_means(fine, few).to(self.weight))

    @staticmethod
    def coarse(grid: Grid, share: float) -> Grid:
        """Return the rows and columns of the global tokens of a map."""
        rows, columns = (max(1, -int(-side * share**0.5 // 1)) for side in grid)
        return rows, columns

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        weight, positions = self.at(grid)
        return weight @ x + positions

    def at(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the weight and positions for a grid."""
        if grid == self.made_for[0]:
            return self.weight, self.positions
        return self.cache.get(self, (grid, self.weight.dtype), self, lambda: self._resized(grid))

    def _resized(self, grid: Grid) -> tuple[Tensor, Tensor]:
        fine, few = self.made_for
        new = self.coarse(grid, self.share)
        weight = resize_grid(resize_grid(self.weight, few, new).T, fine, grid).T
        sums = resize_grid(self.weight.sum(1, keepdim=True), few, new)
        weight = weight * (self.weight.shape[1] / weight.shape[1])  # the sum has another number of terms
        weight = weight + (sums - weight.sum(1, keepdim=True)) / weight.shape[1]  # exactly the same row sums
        return weight.contiguous(), resize_grid(self.positions, few, new)


def nearest_means(fine: Grid, few: Grid) -> Tensor:
    """Return the matrix that averages the cells of a fine grid into those of a coarse one, (m, N)."""
    count = fine[0] * fine[1]
    return F.adaptive_avg_pool2d(torch.eye(count).view(count, 1, *fine), few).flatten(1).T


class Fusion(nn.Module):
    """Fusion of local tokens (B, N, C) and global tokens (B, m, C) of their grids: residual for the local tokens, (B, N, C).

    Args:
        dim, num_heads: channels and heads.
        kind: "cross" for attention from local to global tokens; "add" and "concat" resample the global tokens to the local grid and add
            them, or apply a linear layer to the concatenation.
    """

    def __init__(self, dim: int, num_heads: int, kind: str):
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        if kind == "cross":
            self.q, self.kv, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)
        elif kind == "concat":
            self.proj = Linear(2 * dim, dim)

    def forward(self, local: Tensor, few: Tensor, grid: Grid, coarse: Grid) -> Tensor:
        if self.kind == "cross":
            k, v = self.kv(few).chunk(2, 2)
            return self.proj(multi_head_attention(self.q(local), k, v, self.num_heads))
        image = as_map(few, coarse)
        wide = as_tokens(F.interpolate(image, size=grid, mode="bilinear", align_corners=False))
        return wide if self.kind == "add" else self.proj(torch.cat([local, wide], 2))


class FusionBlock(nn.Module):
    """Block with two streams (see the module's docstring): (B, N, C) of a grid -> the same shape.

    Args:
        dim, num_heads: channels and heads.
        grid, share: see `GlobalTokens`.
        window_size: side of a window, tokens.
        mlp_ratio: ratio of the MLP's hidden channels to dim.
        fusion: see `Fusion`; "local" for no global stream, "global" for no window attention (fusion by attention).
        mlp_after: apply the MLP after the fusion instead of in the local stream.
        drop_path: stochastic depth rate of all branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        share: float,
        window_size: int,
        mlp_ratio: float,
        fusion: str,
        mlp_after: bool,
        drop_path: float,
    ):
        super().__init__()
        self.mlp_after = mlp_after
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = LocalAttention(dim, num_heads, window_size) if fusion != "global" else None
        self.gld = GlobalTokens(dim, grid, share) if fusion != "local" else None
        self.fusion = Fusion(dim, num_heads, "cross" if fusion == "global" else fusion)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        normed = self.norm1(x)
        if self.attn is not None:
            x = x + self.drop_path(self.attn(normed, grid))
        if not self.mlp_after:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.gld is not None:
            few = self.gld(normed, grid)
            x = x + self.drop_path(self.fusion(x, few, grid, self.gld.coarse(grid, self.gld.share)))
        return x + self.drop_path(self.mlp(self.norm2(x))) if self.mlp_after else x


class DeepBlock(TransformerBlock):
    """Transformer block after a depth-wise 3 x 3 convolution as position encoding: (B, N, C) of a grid -> the same shape."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(x + as_tokens(self.position(as_map(x, grid))))


class TokenStage(nn.Module):
    """Downsampling and blocks on tokens: map (B, C_in, H, W) -> map (B, C, h, w)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x)
        grid = (x.shape[2], x.shape[3])
        return as_map(run(self.blocks, as_tokens(x), grid), grid)


@family(
    "maformer",
    variants={
        "pico": dict(
            dims=(32, 64), depths=(1, 2), num_heads=(2, 4), shares=(0.25,), patch_size=2, window_size=4, mlp_ratio=2, image_size=16
        ),
        # widths and depths are this library's; the paper's large model has 85.9 % top-1
        "s": dict(dims=(64, 128, 256, 512), depths=(2, 4, 16, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.1),
        "b": dict(dims=(96, 192, 384, 768), depths=(2, 4, 24, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
        "l": dict(dims=(128, 256, 512, 1024), depths=(2, 4, 24, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    },
    official=rename(),  # no weights were released; the names are this library's
)
class MAFormer(Backbone):
    """MAFormer classifier: images (B, in_chans, H, W), H and W at least one cell of the last stage, -> logits (B, num_classes).

    Args:
        dims, depths, num_heads: channels, blocks and heads per stage.
        shares: ratio of global tokens to tokens for each stage with two streams, which come first; the others are plain transformers.
        patch_size: side of a patch, pixels.
        window_size: side of a window, tokens.
        image_size: side, in pixels, of the square image that the layers over the token axis are made for.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels.
        fusion, mlp_after: see `FusionBlock`.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, shares outside (0, 1], an unknown fusion.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        shares: Sequence[float] = (1 / 16, 1 / 2),
        patch_size: int = 4,
        window_size: int = 7,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        fusion: str = "cross",
        mlp_after: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(dims) == len(depths) == len(num_heads) >= len(shares):
            raise ValueError(
                "dims, depths and num_heads need one value per stage, shares at most as many; "
                f"got {dims}, {depths}, {num_heads} and {shares}"
            )
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares must lie in (0, 1], got {shares}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        strides = [patch_size * 2**k for k in range(len(dims))]
        stages = [Stage(*both) for both in zip(dims, strides, strict=True)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=strides[-1])
        rates = drop_path_rates(drop_path_rate, depths)

        def block(k: int, rate: float) -> nn.Module:
            if k >= len(shares):
                return DeepBlock(dims[k], num_heads[k], mlp_ratio, rate)
            side = max(1, image_size // strides[k])
            return FusionBlock(dims[k], num_heads[k], (side, side), shares[k], window_size, mlp_ratio, fusion, mlp_after, rate)

        self.stages = nn.ModuleList(
            TokenStage(
                conv_patches(dims[k - 1] if k else in_chans, dims[k], 2 if k else patch_size, norm="after"),
                [block(k, rate) for rate in rates[k]],
            )
            for k in range(len(dims))
        )
        self.norm = LayerNorm2d(dims[-1], eps=1e-6)
        init_weights(self)
