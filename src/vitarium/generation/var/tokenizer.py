"""Multi-scale residual tokenizer: an image as K maps of codes of growing size, each coding the residual of the coarser ones.

    rest = f = encoder(image), f^ = 0
    for each scale p_k:   codes = nearest code of area-resize(rest, p_k), by distance or (an option) by angle
                          h     = phi_k(bicubic-resize(codebook[codes]))          phi(h) = h / 2 + conv(h) / 2
                          f^ += h,  rest -= h
    image = decoder(f^)

Notation: B batch, C channels of the codes, H W image, h = w = H / stride, K scales of p_k x p_k codes, L = sum of p_k^2, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.catalog.calling import random_uniform
from vitarium.errors import InputError, UsageError
from vitarium.nn.inputs import check_floats
from vitarium.ops.maps import as_map, as_tokens


def _norm(dim: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, dim, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block, x + conv(SiLU(norm(conv(SiLU(norm(x)))))): (B, in_dim, h, w) -> (B, dim, h, w)."""

    def __init__(self, in_dim: int, dim: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(in_dim, groups), nn.Conv2d(in_dim, dim, 3, padding=1)
        self.norm2, self.conv2 = _norm(dim, groups), nn.Conv2d(dim, dim, 3, padding=1)
        self.shortcut = nn.Conv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y), inplace=True))


class AttentionBlock(nn.Module):
    """Attention with one head over all positions: (B, dim, h, w) -> the same shape."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.norm = _norm(dim, groups)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = as_tokens(self.qkv(self.norm(x)))[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Conv2d):
    """Downsampling by 2, padded at the right and bottom: (B, dim, h, w) -> (B, dim, h / 2, w / 2)."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Upsampling by 2: (B, dim, h, w) -> (B, dim, 2 h, 2 w)."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, optionally with attention after each, then a change of resolution."""

    def __init__(self, in_dim: int, dim: int, depth: int, groups: int, attention: bool, resample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(in_dim if i == 0 else dim, dim, groups) for i in range(depth))
        self.attentions = nn.ModuleList(AttentionBlock(dim, groups) if attention else nn.Identity() for _ in range(depth))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


def _middle(dim: int, groups: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(dim, dim, groups), AttentionBlock(dim, groups), ResBlock(dim, dim, groups))


class Encoder(nn.Module):
    """Encoder: image (B, in_chans, H, W) -> (B, code_dim, H / stride, W / stride); level 0 has the image's resolution."""

    def __init__(self, in_chans: int, dims: Sequence[int], depth: int, code_dim: int, groups: int):
        super().__init__()
        last = len(dims) - 1
        self.conv_in = nn.Conv2d(in_chans, dims[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(dims[max(i - 1, 0)], dim, depth, groups, i == last, Downsample(dim) if i < last else nn.Identity())
            for i, dim in enumerate(dims)
        )
        self.middle = _middle(dims[-1], groups)
        self.norm, self.conv_out = _norm(dims[-1], groups), nn.Conv2d(dims[-1], code_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """Decoder: (B, code_dim, h, w) -> image (B, in_chans, h * stride, w * stride); level 0, the last, has the image's resolution."""

    def __init__(self, in_chans: int, dims: Sequence[int], depth: int, code_dim: int, groups: int):
        super().__init__()
        last = len(dims) - 1
        self.conv_in = nn.Conv2d(code_dim, dims[-1], 3, padding=1)
        self.middle = _middle(dims[-1], groups)
        self.levels = nn.ModuleList(
            Level(dims[min(i + 1, last)], dim, depth, groups, i == last, Upsample(dim) if i > 0 else nn.Identity())
            for i, dim in enumerate(dims)
        )
        self.norm, self.conv_out = _norm(dims[0], groups), nn.Conv2d(dims[0], in_chans, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm(x)))


@dataclass(frozen=True)
class Quantized:
    """Quantized features (B, C, h, w).

    Attributes:
        indices: codes of each scale, (B, p_k^2) int64.
        features: f^, (B, C, h, w); gradients pass straight through to the input features.
        places: residual that each scale codes, (B, p_k^2, C).
        loss: squared difference of f^ and the features, averaged over scales; weight 1 for the codebook, beta for the encoder. A scalar.
    """

    indices: list[Tensor]
    features: Tensor
    places: list[Tensor]
    loss: Tensor


class ResidualQuantizer(nn.Module):
    """Quantizer: features (B, C, h, w) <-> K maps of codes.

    Args:
        vocab_size: number of codes V.
        code_dim: channels C of a code.
        scales: side p_k of each map, ascending; the last is h.
        phi_count: number of convolutions phi, shared by neighbouring scales; 0: one for each scale.
        phi_ratio: share of the convolution in phi; 0: no convolution.
        beta: weight of the loss that moves the encoder towards the codes.
        cosine_codes: whether the nearest code is the one of the smallest angle; the code itself is used at its own length.
    """

    def __init__(
        self,
        vocab_size: int,
        code_dim: int,
        scales: Sequence[int],
        phi_count: int,
        phi_ratio: float,
        beta: float,
        cosine_codes: bool = False,
    ):
        super().__init__()
        self.scales, self.phi_ratio, self.beta, self.cosine_codes = tuple(scales), phi_ratio, beta, cosine_codes
        self.codebook = nn.Embedding(vocab_size, code_dim)
        phi_count = phi_count or len(scales)
        self.phis = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(phi_count if phi_ratio else 0))
        self.phi_of = phi_of_scales(len(scales), phi_count)

    def forward(self, features: Tensor) -> Quantized:
        rest, total = features.detach(), torch.zeros_like(features)
        indices: list[Tensor] = []
        places: list[Tensor] = []
        losses = []
        for k in range(len(self.scales)):
            places.append(self.view(rest, k))
            indices.append(self.nearest(places[k]))
            detail = self.detail(self.codebook(indices[k]), k)
            total, rest = total + detail, rest - detail.detach()
            losses.append(self.beta * F.mse_loss(total.detach(), features) + F.mse_loss(total, features.detach()))
        return Quantized(indices, features + (total - features).detach(), places, torch.stack(losses).mean())

    def nearest(self, places: Tensor) -> Tensor:
        """Return the nearest code of each position: (B, p^2, C) -> (B, p^2)."""
        codes = self.codebook.weight.detach()
        if self.cosine_codes:
            return (places @ F.normalize(codes, dim=1).T).argmax(-1)  # the length of a position is the same for all codes
        return (codes.square().sum(1) - 2 * places @ codes.T).argmin(-1)  # |x|^2 is the same for all codes

    def detail(self, codes: Tensor, k: int) -> Tensor:
        """Return the contribution of codebook vectors (B, p_k^2, C) to f^ at scale k, (B, C, h, w)."""
        side, size = self.scales[k], self.scales[-1]
        h = as_map(codes, (side, side))
        if k < len(self.scales) - 1:
            h = F.interpolate(h, (size, size), mode="bicubic")
        if not self.phi_ratio:
            return h
        return h * (1 - self.phi_ratio) + self.phis[self.phi_of[k]](h) * self.phi_ratio

    def view(self, total: Tensor, k: int) -> Tensor:
        """Resize a map (B, C, h, w) to scale k: (B, p_k^2, C)."""
        if k < len(self.scales) - 1:
            total = F.interpolate(total, (self.scales[k],) * 2, mode="area")
        return as_tokens(total)


def phi_of_scales(scales: int, count: int) -> list[int]:
    """Return the convolution that each scale uses, of `count`: the one whose tick is nearest to k / (K - 1).

    Ties are decided by NumPy's rounding, as in the authors' code, on which released weights depend.
    """
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - k / max(scales - 1, 1)))) for k in range(scales)]


OFFICIAL = rename(
    (r"ema_vocab_hit_SV$", None),  # usage of codes; its shape depends on the scales
    (r"^quantize\.embedding\.", "quantizer.codebook."),
    (r"^quantize\.quant_resi\.qresi_ls\.(\d+)\.", r"quantizer.phis.\1."),
    (r"^quantize\.quant_resi\.qresi\.", "quantizer.phis.0."),
    (r"^quantize\.quant_resi\.(\d+)\.", r"quantizer.phis.\1."),
    (r"^quant_conv\.", "to_codes."),
    (r"^post_quant_conv\.", "from_codes."),
    (r"^(en|de)coder\.(?:down|up)\.(\d+)\.block\.(\d+)\.nin_shortcut\.", r"\1coder.levels.\2.blocks.\3.shortcut."),
    (r"^(en|de)coder\.(?:down|up)\.(\d+)\.block\.", r"\1coder.levels.\2.blocks."),
    (r"^(en|de)coder\.(?:down|up)\.(\d+)\.attn\.(\d+)\.proj_out\.", r"\1coder.levels.\2.attentions.\3.proj."),
    (r"^(en|de)coder\.(?:down|up)\.(\d+)\.attn\.", r"\1coder.levels.\2.attentions."),
    (r"^(en|de)coder\.(?:down|up)\.(\d+)\.(?:down|up)sample\.conv\.", r"\1coder.levels.\2.resample."),
    (r"^(en|de)coder\.mid\.block_1\.", r"\1coder.middle.0."),
    (r"^(en|de)coder\.mid\.attn_1\.proj_out\.", r"\1coder.middle.1.proj."),
    (r"^(en|de)coder\.mid\.attn_1\.", r"\1coder.middle.1."),
    (r"^(en|de)coder\.mid\.block_2\.", r"\1coder.middle.2."),
    (r"^(en|de)coder\.norm_out\.", r"\1coder.norm."),
)
PREPARATION: dict[str, Any] = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="lanczos", crop_pct=1 / 1.125)
RELEASE = {"vae_ch160v4096z32": ("hf:FoundationVision/var/vae_ch160v4096z32.pth",)}


@family(
    "var",
    name="var_tokenizer",
    variants={
        "pico": dict(
            dim=32, dim_mult=(1, 1, 1), depth=1, groups=8, code_dim=8, vocab_size=128, scales=(1, 2, 3, 4), phi_count=2, image_size=16
        ),
        "256": dict(scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), image_size=256),  # 108.9 M; the codec of d16 to d30
        "512": dict(scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), image_size=512),  # the same weights; of d36
    },
    official=OFFICIAL,
    weights={"256": RELEASE, "512": RELEASE},
    learner="var_tokenizer",
    **PREPARATION,
)
class VARTokenizer(nn.Module):
    """Autoencoder with multi-scale codes: image (B, in_chans, H, W) in [-1, 1] -> its reconstruction, same shape and range.

    Args:
        scales: side of each map of codes, ascending; the last is the side of the image over the stride 2^(levels - 1).
        dim: channels at the image's resolution.
        dim_mult: channels of each level over `dim`.
        depth: residual blocks per level of the encoder; the decoder has one more.
        groups: groups of the group norms.
        code_dim: channels C of a code.
        vocab_size: number of codes V.
        phi_count, phi_ratio, beta, cosine_codes: see `ResidualQuantizer`.
        conv_size: side of the convolutions' kernels before and behind the quantizer, odd.
        image_size: side of the images, pixels; it follows from scales and levels, and is checked against them.

    Raises:
        ValueError: the scales do not ascend, or do not end at image_size over the stride; phi_ratio or conv_size out of range.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int],
        dim: int = 160,
        dim_mult: Sequence[int] = (1, 1, 2, 2, 4),
        depth: int = 2,
        groups: int = 32,
        code_dim: int = 32,
        vocab_size: int = 4096,
        phi_count: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        cosine_codes: bool = False,
        conv_size: int = 3,
        in_chans: int = 3,
        image_size: int | None = None,
    ):
        if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1:
            raise ValueError(f"scales must be ascending whole numbers of at least 1, got {scales}")
        if not 0 <= phi_ratio <= 1 or phi_count < 0:
            raise ValueError(f"phi_ratio must be from 0 to 1 and phi_count at least 0, got {phi_ratio} and {phi_count}")
        if conv_size < 1 or conv_size % 2 == 0:
            raise ValueError(f"conv_size must be an odd number of at least 1, got {conv_size}")
        super().__init__()
        self.scales, self.code_dim, self.vocab_size, self.in_chans = tuple(scales), code_dim, vocab_size, in_chans
        dims = [dim * m for m in dim_mult]
        self.image_size = scales[-1] * 2 ** (len(dims) - 1)
        if image_size not in (None, self.image_size):
            raise ValueError(f"scales up to {scales[-1]} are for images of image_size={self.image_size}, got image_size={image_size}")
        self.encoder = Encoder(in_chans, dims, depth, code_dim, groups)
        self.to_codes = nn.Conv2d(code_dim, code_dim, conv_size, padding=conv_size // 2)
        self.quantizer = ResidualQuantizer(vocab_size, code_dim, scales, phi_count, phi_ratio, beta, cosine_codes)
        self.from_codes = nn.Conv2d(code_dim, code_dim, conv_size, padding=conv_size // 2)
        self.decoder = Decoder(in_chans, dims, depth + 1, code_dim, groups)

    def forward(self, image: Tensor) -> Tensor:
        return self.to_image(self.quantizer(self.features(image)).features)

    def example_inputs(self, n: int = 1, image_size: int | tuple[int, int] | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Return image (n, in_chans, H, W) in [-1, 1], of the size that the scales fix.

        Raises:
            UsageError: another size.
        """
        side = self.image_size
        if image_size not in (None, side, (side, side)):
            raise UsageError(f"this {type(self).__name__} takes images of {side}x{side} pixels alone, got image_size={image_size}")
        return {"image": random_uniform(self, (n, self.in_chans, side, side), -1.0, 1.0, seed=seed)}

    def features(self, image: Tensor) -> Tensor:
        """Encode an image (B, in_chans, H, W) in [-1, 1] into features to be quantized, (B, C, h, w).

        Raises:
            InputError: the shape does not suit the scales.
        """
        self.check_image(image)
        return self.to_codes(self.encoder(image))

    def to_image(self, features: Tensor) -> Tensor:
        """Decode f^ (B, C, h, w) into an image (B, in_chans, H, W) in [-1, 1]."""
        return self.decoder(self.from_codes(features)).clamp(-1, 1)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Encode an image (B, in_chans, H, W) in [-1, 1] into codes, a map (B, p_k^2) int64 per scale."""
        return self.quantizer(self.features(image)).indices

    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        """Decode codes, (B, p_k^2) for the first scales or all, into an image (B, in_chans, H, W) in [-1, 1].

        With only the first scales, the result is the image as coded by them.
        """
        return self.to_image(self.totals(indices)[-1])

    def totals(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """Return f^ after each of the given scales, (B, C, h, w) each.

        Raises:
            InputError: no codes, or numbers of codes that do not match the scales.
        """
        counts, wanted = [tuple(i.shape[1:]) for i in indices], [(p * p,) for p in self.scales]
        if not counts or counts != wanted[: len(counts)]:
            raise InputError(f"the codes must be (B, p^2) for p in {self.scales} or the first of these, got p^2 = {counts}")
        totals: list[Tensor] = []
        for k, codes in enumerate(indices):
            detail = self.quantizer.detail(self.quantizer.codebook(codes), k)
            totals.append(totals[-1] + detail if totals else detail)
        return totals

    def inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """Return the transformer's input for predicting scales 2, 3, ... of known codes: (B, L - p_1^2, C)."""
        totals = self.totals(indices)[: len(self.scales) - 1]
        views = [self.quantizer.view(total, k + 1) for k, total in enumerate(totals)]
        return torch.cat(views, 1) if views else self.quantizer.codebook.weight.new_zeros(len(indices[0]), 0, self.code_dim)

    def check_image(self, image: Tensor) -> None:
        """Raise InputError if an image is not (B, in_chans, image_size, image_size) of floating-point values."""
        check_floats(self, image, ("B", self.in_chans, self.image_size, self.image_size), "image")
