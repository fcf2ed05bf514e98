"""DRCT: dense residuals for super-resolution (Hsu et al., "Saving Image Super-resolution away from Information Bottleneck", 2024).

In chains of Swin blocks the features lose information towards the end of the network. Here each block of a group takes all features that
the group has computed, and adds only a few channels to them; the group ends in a residual.

    x_i = lrelu(A_i swin_i([x, x_1, ..., x_{i-1}]))     i = 1 .. 4, growth g channels each; blocks 2 and 4 on the shifted grid of windows
    x  <- x + 0.2 A_5 swin_5([x, x_1, ..., x_4])

A convolution before the groups, one after them with a residual around all, and pixel shuffling to the full size. No bicubic skip.

Follows the authors' code (github ming053l/DRCT), whose checkpoints load by name. Any image size, reflected to a multiple of the window
as in that code; the mean over flips and rotations is `vitarium restore --ensemble`. Left out: absolute positions, no norm after the first
convolution, no convolution after the groups, dropout, another scale of attention (their configs set none of them), and arguments that
their code takes and does not use (compress_ratio, squeeze_factor, conv_scale, overlap_ratio). Cost: linear in image area at a fixed window.

Speed: a shifted grid needs no rolling and no mask, because its border windows are smaller windows. All layers of a block except attention
work on single tokens, so that in inference on a CPU a block processes a few windows at a time from start to end, and its tensors stay in
the cache. Of a block's output only A_i's few channels are used: in inference A_i is multiplied into the block's last layer.

Notation: B batch, H W map, N = H W tokens, C channels, g growth, M window side, n tokens per window, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitarium.catalog import chain, family, rename
from vitarium.catalog.registry import State
from vitarium.generation.restoration.restorer import Restorer, reflect_to_multiple
from vitarium.nn import Attention, DropPath, EvalCache, Linear, Mlp, RelativePositionBias, drop_path_rates, init_weights
from vitarium.ops.linear import in_plain_inference, linear

PIECE_TOKENS = 2048
"""Number of tokens that a block processes at once in inference on a CPU."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid of windows over a batch of maps, its windows sorted by their shape.

    Attributes:
        order: (B N,) int64; position i of this grid holds the token order[i] of the unshifted grid. None for the unshifted grid.
        inverse: (B N,) int64, the inverse order. None for the unshifted grid.
        shapes: (height, width, first position, last position + 1) of each shape of window, tokens.
    """

    order: Tensor | None
    inverse: Tensor | None
    shapes: tuple[tuple[int, int, int, int], ...]

    def pieces(self, most: int | None) -> Iterator[tuple[int, int, int, int]]:
        """Return (height, width, first position, last position + 1) of runs of equal windows of about `most` tokens; None: of any number.

        A graph with a variable batch is traced with None, because the number of pieces would fix the batch.
        """
        if most is None:
            yield from self.shapes
            return
        for height, width, first, last in self.shapes:
            step = max(1, most // (height * width)) * height * width
            for start in range(first, last, step):
                yield height, width, start, min(last, start + step)


def window_grids(batch: int, height: int, width: int, size: int, device: torch.device) -> tuple[Tensor, Grid, Grid]:
    """The unshifted grid with row-major tokens, the unshifted grid, and the grid shifted by half a window."""
    rest, rest_shapes = _sorted_windows(batch, height, width, size, 0, device)
    moved, moved_shapes = _sorted_windows(batch, height, width, size, size // 2, device)
    order = _inverse(rest)[moved]
    return rest, Grid(None, None, rest_shapes), Grid(order, _inverse(order), moved_shapes)


def _sorted_windows(
    batch: int, height: int, width: int, size: int, shift: int, device: torch.device
) -> tuple[Tensor, tuple[tuple[int, int, int, int], ...]]:
    tokens = torch.arange(batch * height * width, device=device).view(batch, height, width)
    rows, columns = _intervals(height, size, shift), _intervals(width, size, shift)
    order: list[Tensor] = []
    shapes: list[tuple[int, int, int, int]] = []
    first = 0
    for tall, top, bottom in rows:
        for wide, left, right in columns:
            block = tokens[:, top:bottom, left:right]
            block = block.reshape(batch, (bottom - top) // tall, tall, (right - left) // wide, wide).transpose(2, 3)
            order.append(block.flatten())
            shapes.append((tall, wide, first, first + block.numel()))
            first += block.numel()
    return torch.cat(order), tuple(shapes)


def _intervals(side: int, size: int, shift: int) -> list[tuple[int, int, int]]:
    """Return (length of an interval, start, end) of the runs of equal intervals into which the windows cut an axis."""
    if not shift:
        return [(size, 0, side)]
    end = side - (size - shift)
    return [run for run in ((shift, 0, shift), (size, shift, end), (size - shift, end, side)) if run[1] < run[2]]


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class WindowAttention(Attention):
    """Self-attention inside windows of one shape with a relative position bias: (windows, n, C) -> (windows, n, C)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, *, qkv_bias: bool = True):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias)
        self.position_bias = RelativePositionBias(window_size, num_heads)
        self.cache = EvalCache()

    def bias(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return the bias (1, h, n, n) of windows of height x width tokens, n = height * width, a part of the whole window's bias."""
        return self.cache.get(self, (height, width, dtype), self.position_bias.table, lambda: self._bias(height, width).to(dtype))

    def _bias(self, height: int, width: int) -> Tensor:
        size, bias = self.position_bias.window_size, self.position_bias()
        bias = bias.view(-1, size, size, size, size)[:, :height, :width, :height, :width]
        return bias.reshape(1, -1, height * width, height * width)


class DenseBlock(nn.Module):
    """A Swin block and its narrow 1x1 output layer A: tokens of C channels -> tokens of `out_dim` channels."""

    def __init__(self, dim: int, out_dim: int, num_heads: int, window_size: int, mlp_ratio: float, qkv_bias: bool, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.adjust = Linear(dim, out_dim)
        self.cache = EvalCache()

    def forward(self, parts: Sequence[Tensor], grid: Grid) -> Tensor:
        """Process channels in parts, each (B N, c), in the order of the unshifted grid: (B N, out_dim) in that order."""
        plain = not self.training and in_plain_inference(*parts, self.adjust.weight, self.mlp.fc2.weight)
        results = []
        for height, width, start, stop in grid.pieces(PIECE_TOKENS if plain and parts[0].device.type == "cpu" else None):
            if grid.order is None:
                x = torch.cat([part[start:stop] for part in parts], 1)
            else:
                x = torch.cat([part.index_select(0, grid.order[start:stop]) for part in parts], 1)
            bias = self.attn.bias(height, width, x.dtype)
            results.append(self.windows(x.view(-1, height * width, x.shape[1]), bias, fold=plain).flatten(0, 1))
        result = torch.cat(results) if results else parts[0].new_empty(0, self.adjust.out_features)  # none in an empty batch
        return result if grid.inverse is None else result.index_select(0, grid.inverse)

    def windows(self, x: Tensor, bias: Tensor, *, fold: bool) -> Tensor:
        """Process (windows, n, C) -> (windows, n, out_dim); with `fold` the MLP's second layer W and A are one matrix A W."""
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        y = self.norm2(x)
        if fold and self._foldable(x):
            weight, offset = self._folded()
            hidden = linear(y, self.mlp.fc1.weight, self.mlp.fc1.bias, gelu="none")
            return linear(x, self.adjust.weight, offset).add_(linear(hidden, weight))
        return self.adjust(x + self.drop_path(self.mlp(y)))

    def _foldable(self, x: Tensor) -> bool:
        """Return whether the layers are the original ones, without hooks: quantizers and explainers need each layer's own output."""
        layers = (self.mlp.fc1, self.mlp.fc2, self.adjust)
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in (self.mlp, self.mlp.act, self.drop_path, *layers))
        return all(type(layer) is Linear for layer in layers) and not watched and not torch.is_autocast_enabled(x.device.type)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return A W (out_dim, hidden) and A b + a (out_dim,)."""
        second, adjust = self.mlp.fc2, self.adjust
        stamp = tuple((p.data_ptr(), p._version) for p in (second.weight, second.bias, adjust.bias) if not p.is_inference())
        return self.cache.get(
            self,
            (second.weight.dtype, stamp),
            adjust.weight,
            lambda: (adjust.weight @ second.weight, adjust.weight @ second.bias + adjust.bias),
        )


class DenseGroup(nn.Module):
    """Five dense blocks with a residual connection: (B N, C) in the order of the unshifted grid -> the same shape."""

    def __init__(self, dim: int, growth: int, num_heads: int, window_size: int, mlp_ratio: float, qkv_bias: bool, drop_path: float):
        super().__init__()
        self.blocks = nn.ModuleList()
        for i in range(5):
            width, ratio = dim + i * growth, mlp_ratio if i < 3 else 1.0  # the authors' last two MLPs always have ratio 1
            heads = num_heads - width % num_heads
            self.blocks.append(DenseBlock(width, dim if i == 4 else growth, heads, window_size, ratio, qkv_bias, drop_path))

    def forward(self, x: Tensor, rest: Grid, moved: Grid) -> Tensor:
        parts = [x]
        for i, block in enumerate(self.blocks):
            found = block(parts, moved if i % 2 else rest)
            parts.append(F.leaky_relu(found, 0.2) if i < 4 else found)
        return torch.add(x, parts[-1], alpha=0.2)


def _interpolation_kernels(scale: int) -> Tensor:
    """Return the weights of quadratic interpolation at the scale^2 positions inside a pixel: (scale^2, 3, 3), in pixel-shuffle order."""
    x = (torch.arange(scale) + 0.5) / scale - 0.5
    along = torch.stack([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2], 1)
    return torch.einsum("ay,bx->abyx", along, along).flatten(0, 1)


def _names(state: State) -> State:
    """Rename the authors' parameters; their 1x1 convolutions are linear layers here."""
    return {name: tensor.flatten(1) if ".adjust.weight" in name else tensor for name, tensor in state.items()}


OFFICIAL = chain(
    rename(
        (r"relative_position_index$|attn_mask$", None),
        *(
            rule
            for k in range(1, 6)
            for rule in (
                (
                    rf"^layers\.(\d+)\.swin{k}\.attn\.relative_position_bias_table$",
                    rf"groups.\1.blocks.{k - 1}.attn.position_bias.table",
                ),
                (rf"^layers\.(\d+)\.swin{k}\.", rf"groups.\1.blocks.{k - 1}."),
                (rf"^layers\.(\d+)\.adjust{k}\.", rf"groups.\1.blocks.{k - 1}.adjust."),
            )
        ),
        (r"^patch_embed\.norm\.", "norm_first."),
        (r"^conv_before_upsample\.0\.", "conv_before_upsample."),
    ),
    _names,
)


@family(
    "drct",
    variants={
        "pico": dict(
            embed_dim=32, growth=8, depths=(6, 6), num_heads=2, window_size=8, num_feat=32, scale=2, drop_path_rate=0.0, image_size=32
        ),
        "x2": dict(scale=2),  # 14.0 M
        "x3": dict(scale=3),
        "x4": dict(scale=4),  # 14.14 M; PSNR-Y on Set5 33.11, Set14 29.35, B100 28.18, Urban100 28.06, Manga109 32.59
        "large_x2": dict(scale=2, depths=(6,) * 12),
        "large_x3": dict(scale=3, depths=(6,) * 12),  # 27.6 M
        "large_x4": dict(scale=4, depths=(6,) * 12),  # 33.37, 29.54, 28.16, 28.70, 33.14
    },
    official=OFFICIAL,
    learner="restoration",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
class DRCT(Restorer):
    """Enlarge images (B, in_chans, H, W) in 0..1, any H and W: (B, in_chans, scale H, scale W), about 0..1, not clipped.

    Args:
        scale: 2, 4, 8 ... or 3.
        embed_dim: number of channels C between the groups.
        growth: number of channels that a block adds inside a group.
        depths: one number per group; as in the authors' code it affects only stochastic depth (group k has the rate of block
            sum(depths[:k]) of a linear rise).
        num_heads: requested number of heads; a block of width c has num_heads - c mod num_heads of them.
        window_size: side M of a window, tokens; even, because the grid is shifted by half of it.
        mlp_ratio: hidden channels of the first three MLPs of a group over their width.
        qkv_bias: whether queries, keys and values have a bias.
        num_feat: number of channels of the reconstruction.
        img_range: factor of the image inside the network.
        drop_path_rate: stochastic depth at the end of the rise.

    Raises:
        ValueError: a scale that pixel shuffling does not support, or heads that do not divide a block's width.
    """

    mean: Tensor
    _kept: tuple[tuple, tuple[Tensor, Grid, Grid]] | None

    def __init__(
        self,
        *,
        scale: int = 4,
        embed_dim: int = 180,
        growth: int = 32,
        depths: Sequence[int] = (6,) * 6,
        num_heads: int = 6,
        window_size: int = 16,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        num_feat: int = 64,
        img_range: float = 1.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.1,
    ):
        steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        if scale < 1 or (scale != 3 and scale & (scale - 1)):
            raise ValueError(f"scale must be 3 or a power of 2, got {scale}")
        super().__init__(scale=scale, in_chans=in_chans, multiple=window_size, reach=(2 * len(depths) + 1) * window_size + 5)
        self.window_size, self.img_range, self.checkpointing = window_size, img_range, False
        self._kept = None
        mean = torch.tensor((0.4488, 0.4371, 0.4040) if in_chans == 3 else (0.0,) * in_chans)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.norm_first = nn.LayerNorm(embed_dim)
        rates = [rates[0] for rates in drop_path_rates(drop_path_rate, depths)]
        self.groups = nn.ModuleList(DenseGroup(embed_dim, growth, num_heads, window_size, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.conv_before_upsample = nn.Conv2d(embed_dim, num_feat, 3, padding=1)
        self.upsample = nn.Sequential(
            *(part for s in steps for part in (nn.Conv2d(num_feat, s * s * num_feat, 3, padding=1), nn.PixelShuffle(s)))
        )
        self.conv_last = nn.Conv2d(num_feat, in_chans, 3, padding=1)
        init_weights(self, conv=False)

    def restore(self, image: Tensor) -> Tensor:
        first = self.conv_first((image - self.mean) * self.img_range)
        x = self.conv_after_body(self.deep_features(first)) + first
        x = F.leaky_relu(self.conv_before_upsample(x), 0.01)
        return self.conv_last(self.upsample(x)) / self.img_range + self.mean

    def deep_features(self, first: Tensor) -> Tensor:
        """Apply the groups to the first convolution's map, and normalise: (B, C, H, W), sides that are multiples of M -> the same shape."""
        *_, (x, inverse) = self._through_groups(first)
        return self._map(self.norm(x), inverse, first)

    def group_maps(self, image: Tensor) -> list[Tensor]:
        """Return the map after each group, (B, C, H', W') of the image reflected to a multiple of M, to show the bottleneck."""
        self.check_image(image)
        first = self.conv_first((reflect_to_multiple(image, self.multiple) - self.mean) * self.img_range)
        return [self._map(x, inverse, first) for x, inverse in self._through_groups(first)]

    def _through_groups(self, first: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the tokens in window order after a group, and the inverse order."""
        batch, _, height, width = first.shape
        order, rest, moved = self._grids(batch, height, width, first.device)
        inverse = _inverse(order)
        x = self.norm_first(first.permute(0, 2, 3, 1).flatten(0, 2)).index_select(0, order)
        for group in self.groups:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(group, x, rest, moved, use_reentrant=False)
            else:
                x = group(x, rest, moved)
            yield x, inverse

    @staticmethod
    def _map(x: Tensor, inverse: Tensor, like: Tensor) -> Tensor:
        batch, _, height, width = like.shape
        return x.index_select(0, inverse).view(batch, height, width, x.shape[1]).permute(0, 3, 1, 2)

    def _grids(self, batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Grid, Grid]:
        """Return the grids of a size; those of the last size are cached."""
        key = (batch, height, width, device)
        if torch.compiler.is_compiling():
            return window_grids(batch, height, width, self.window_size, device)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):  # a later training step could not use an inference tensor
                self._kept = key, window_grids(batch, height, width, self.window_size, device)
        return self._kept[1]

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kept": None}

    @torch.no_grad()
    def start_as_interpolation(self) -> None:
        """Set some weights in place so that the initial model is a quadratic interpolation of its input, so that a short training need not
        learn it. Not in the authors' code.

        The first channels pass the image around the groups, with both signs so that it survives the leaky ReLU; the last convolution
        initially uses only those. All weights remain trainable.
        """
        chans = self.in_chans
        for conv in (self.conv_first, self.conv_after_body, self.conv_before_upsample, self.conv_last):
            rows = 2 * chans if conv is self.conv_before_upsample else chans
            nn.init.zeros_(conv.weight[:rows])
            nn.init.zeros_(conv.bias[:rows])  # type: ignore[index]
        for c in range(chans):
            self.conv_first.weight[c, c, 1, 1] = 1
            for row, sign in ((c, 1.0), (c + chans, -1.0)):
                self.conv_before_upsample.weight[row, c, 1, 1] = sign
                self.conv_last.weight[c, row, 1, 1] = sign / 1.01
        for conv in (part for part in self.upsample if isinstance(part, nn.Conv2d)):
            phases = conv.out_channels // conv.in_channels
            kernels = _interpolation_kernels(round(phases**0.5)).to(conv.weight)
            for c in range(2 * chans):
                nn.init.zeros_(conv.weight[c * phases : (c + 1) * phases])
                nn.init.zeros_(conv.bias[c * phases : (c + 1) * phases])  # type: ignore[index]
                conv.weight[c * phases : (c + 1) * phases, c] = kernels

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each group in the backward pass: less memory, about a third more time."""
        self.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("position_bias.table")}
