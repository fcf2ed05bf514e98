"""Scattering Vision Transformer: gating of wavelet coefficients in the first stage (Patro and Agneeswaran, 2023).

The idea: the invertible dual-tree complex wavelet transform splits each channel into a low-pass map and six complex maps of oriented edges.
The low-pass map, which contains most of the energy, is multiplied by a learned gate per position; the edges pass a small complex MLP over
the channels, shared by all positions and orientations. The inverse transform returns tokens. Later stages use attention.

    (low, high) = DTCWT(x);  low <- w * low;  high <- A_2 ReLU(A_1 high + c_1) + c_2 over blocks of channels, A and c complex, ReLU of the
    real and the imaginary part each;  Scatter(x) = DTCWT^-1(low, high)
    x <- x + Mixer(LN(x));  x <- x + MLP(LN(x)), in the pyramid of vitarium.nn.MixerPyramid

Follows the authors' code (github badripatro/svt); its checkpoints load by name, without the wavelet filters in them, which are computed
here. Left out: MixToken, which belongs to training with token labels, and `sr_ratios`, which the authors' blocks do not read. Any image
size: w is resized bilinearly, and the last row or column of a map with odd sides is repeated for the transform (the authors' code accepts
one size).
Cost: linear in the area of the map, except for the transform, which is a few small matrix products, area times side.

Speed: a filter along one axis, with mirrored borders, is one matrix, so the transform is one matrix product per axis; a complex layer is
one product on concatenated real and imaginary parts; `fuse()` folds the batch norms of the stem.

Legend: B batch, N = h w tokens of a grid (h, w), C channels, P positions and orientations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import chain, family, join, rename
from vitarium.errors import InputError
from vitarium.nn import EvalCache, MixerPyramid
from vitarium.nn.mixer_pyramid import Grid, pyramid_rules
from vitarium.ops.maps import as_map, as_tokens
from vitarium.ops.precision import without_autocast
from vitarium.ops.wavelets import FilterBank, dtcwt, filter_bank, inverse_dtcwt

BLOCKS = 4
"""Number of channel blocks of the block-diagonal complex layers."""


def complex_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a block-diagonal complex linear layer to concatenated real and imaginary parts: (B, blocks, 2 d, P) -> (B, blocks, 2 k, P).

    Args:
        x: real parts of d values, then their imaginary parts.
        weight: (2, blocks, d, k), real and imaginary part.
        bias: (2, blocks, k).
    """
    real, imaginary = weight.transpose(2, 3)
    matrix = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
    return matrix @ x + torch.cat([bias[0], bias[1]], 1)[..., None]


def exact(x: Tensor) -> torch.dtype:
    """Return the dtype of the computation: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


class Scattering(nn.Module):
    """Gating of wavelet coefficients, a token mixer: tokens (B, h w, dim) and their grid (h, w) -> the same shape.

    Args:
        dim: channels, a multiple of 4.
        grid: the grid that the gate of the low-pass map is made for; it is resized for others.

    Raises:
        ValueError: dim is not a multiple of 4.
    """

    def __init__(self, dim: int, grid: Grid):
        if dim % BLOCKS:
            raise ValueError(f"scattering needs a multiple of {BLOCKS} channels, got {dim}")
        super().__init__()
        part = dim // BLOCKS
        new = lambda *shape: nn.Parameter(0.02 * torch.randn(shape))
        self.complex_weight_ll = new(dim, *(side + side % 2 for side in grid))
        self.complex_weight_lh_1, self.complex_weight_lh_2 = new(2, BLOCKS, part, part), new(2, BLOCKS, part, part)
        self.complex_weight_lh_b1, self.complex_weight_lh_b2 = new(2, BLOCKS, part), new(2, BLOCKS, part)
        self.cache = EvalCache()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return as_tokens(self.mix(as_map(x, grid)))

    def mix(self, x: Tensor) -> Tensor:
        """Mix a map, (B, dim, h, w) -> the same shape."""
        height, width = x.shape[-2:]
        with without_autocast(x):
            y = x.to(exact(x))
            if height % 2:
                y = torch.cat([y, y[..., -1:, :]], -2)
            if width % 2:
                y = torch.cat([y, y[..., -1:]], -1)
            gate, bank = self.constants((y.shape[-2], y.shape[-1]), y)
            low, real, imaginary = dtcwt(y.contiguous(), bank)
            real, imaginary = self.mix_bands(real, imaginary)
            return inverse_dtcwt(low * gate, real, imaginary, bank)[..., :height, :width].to(x.dtype)

    def constants(self, grid: Grid, like: Tensor) -> tuple[Tensor, FilterBank]:
        """Return the gate of the low-pass map for a grid with even sides, and the filters, in the dtype of `like`."""

        def build() -> tuple[Tensor, FilterBank]:
            gate = self.complex_weight_ll.to(like.dtype)
            if tuple(gate.shape[1:]) != grid:
                gate = resize_gate(gate, grid)
            return gate, filter_bank(*grid, like)

        return self.cache.get(self, (grid, like.dtype), self.complex_weight_ll, build)

    def mix_bands(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the complex MLP over the channels to real and imaginary parts, (B, dim, 6, h / 2, w / 2) each -> the same shapes."""
        shape, dtype = real.shape, real.dtype
        apart = (shape[0], BLOCKS, shape[1] // BLOCKS, shape[2] * shape[3] * shape[4])
        x = torch.cat([real.reshape(apart), imaginary.reshape(apart)], 2)
        x = F.relu(complex_layer(x, self.complex_weight_lh_1.to(dtype), self.complex_weight_lh_b1.to(dtype)))
        x = complex_layer(x, self.complex_weight_lh_2.to(dtype), self.complex_weight_lh_b2.to(dtype))
        real, imaginary = x.chunk(2, 2)
        return real.reshape(shape), imaginary.reshape(shape)


class ChannelTokenScattering(Scattering):
    """Scattering on half of the channels, a depth-wise 3 x 3 convolution on the other half, interleaved: (B, h w, dim) -> the same shape.

    The scattering has an additional complex MLP along each row of the bands. No released model uses it (the letter T of `SVT`).

    Args:
        dim: channels, a multiple of 8.
        grid: the only grid (h, w) that it accepts, even.
    """

    def __init__(self, dim: int, grid: Grid):
        super().__init__(dim // 2, grid)
        h, w = grid[0] // 2, grid[1] // 2
        new = lambda *shape: nn.Parameter(0.02 * torch.randn(shape))
        self.complex_weight_lh_1_t, self.complex_weight_lh_2_t = new(2, h, w, w), new(2, h, w, w)
        self.complex_weight_lh_b1_t, self.complex_weight_lh_b2_t = new(2, h, w), new(2, h, w)
        self.conv = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2)
        self.grid = grid

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if grid != self.grid:
            raise InputError(f"ChannelTokenScattering is made for {self.grid[0]}x{self.grid[1]} tokens, got {grid[0]}x{grid[1]}")
        near, far = as_map(x, grid).chunk(2, 1)
        return as_tokens(torch.stack([self.conv(near), self.mix(far)], 2).flatten(1, 2))

    def mix_bands(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        lines = lambda t: t.permute(0, 3, 4, 1, 2).flatten(3)  # (B, h, w, C 6)
        x = torch.cat([lines(t) for t in super().mix_bands(real, imaginary)], 2)
        dtype = x.dtype
        x = F.relu(complex_layer(x, self.complex_weight_lh_1_t.to(dtype), self.complex_weight_lh_b1_t.to(dtype)))
        x = complex_layer(x, self.complex_weight_lh_2_t.to(dtype), self.complex_weight_lh_b2_t.to(dtype))
        back = lambda t: t.unflatten(3, (real.shape[1], 6)).permute(0, 3, 4, 1, 2)
        real, imaginary = (back(t) for t in x.chunk(2, 2))
        return real, imaginary


def resize_gate(gate: Tensor, grid: Grid) -> Tensor:
    """Resize a gate of the low-pass map to another grid, bilinear: (C, h, w) -> (C, *grid)."""
    return F.interpolate(gate[None], grid, mode="bilinear", align_corners=False)[0]


OFFICIAL = chain(rename((r"\.attn\.[xi]fm\.", None), *pyramid_rules(4)), join("qkv", "q", "kv"))
_H: dict[str, Any] = dict(mlp_ratios=(8, 8, 4, 4), mixers="SAAA")


@family(
    "svt",
    variants={
        "pico": dict(
            depths=(1, 2), dims=(32, 64), num_heads=(2, 4), mlp_ratios=(4, 4), mixers="SA", stem_dim=16, patch_size=2, image_size=16
        ),
        # 21.6 M, 84.2 % top-1; 32.4 M, 85.2 %; 54.1 M, 85.7 %
        "h_small": dict(depths=(3, 4, 6, 3), dims=(64, 128, 320, 448), num_heads=(2, 4, 10, 14), stem_dim=32, drop_path_rate=0.1, **_H),
        "h_base": dict(depths=(3, 4, 12, 3), dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), drop_path_rate=0.2, **_H),
        "h_large": dict(depths=(3, 6, 18, 3), dims=(96, 192, 384, 512), num_heads=(3, 6, 12, 16), drop_path_rate=0.3, **_H),
    },
    official=OFFICIAL,
)
class SVT(MixerPyramid):
    """SVT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Arguments as for `vitarium.nn.MixerPyramid`, with `Scattering` for the letter S and `ChannelTokenScattering`, for images of `image_size`
    alone, for the letter T.
    """

    letters = "STA"

    def make_mixer(self, letter: str, dim: int, num_heads: int, grid: Grid) -> nn.Module:
        mixers: dict[str, type[nn.Module]] = {"S": Scattering, "T": ChannelTokenScattering}
        return mixers[letter](dim, grid) if letter in mixers else super().make_mixer(letter, dim, num_heads, grid)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a gate of a checkpoint to the grid of this model; return None for any other tensor."""
        if not name.endswith("complex_weight_ll") or tensor.ndim != 3 or tensor.shape[0] != shape[0]:
            return None
        return resize_gate(tensor, (shape[1], shape[2]))
