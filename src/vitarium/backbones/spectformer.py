"""SpectFormer: spectral filters in the first layers, attention in the later ones (Patro et al., 2023).

The idea: the early layers of a vision transformer extract edges and textures, for which a learned filter in the Fourier domain is
sufficient and cheap; attention in the later layers models relations between parts of the image. A letter per layer selects the mixer: S
spectral, A attention.

    Gate(x) = irfft2(w * rfft2(x)), w complex, one value per channel and frequency: a circular convolution with a kernel of the map's size
    `spectformer`, isotropic:  S: x <- x + MLP(LN(Gate(LN(x)))), one residual;   A: a transformer block
    `spectformer_h`, a pyramid (vitarium.nn.MixerPyramid):  x <- x + Mixer(LN(x));  x <- x + MLP(LN(x)), for both letters

Follows the authors' code (github badripatro/SpectFormers); its checkpoints load by name. Any image size: filters (bilinear) and the
position table (bicubic) are resized to the grid; the published code accepts one size, and its helper for position tables takes one row
for that of a class token, which the models lack. Left out of the authors' constructors: `representation_size`, whose layer their forward
pass does not call, uniform stochastic depth, MixToken, and `sr_ratios`, which their blocks do not read.
Cost: tokens times their logarithm in S layers, quadratic in tokens in A layers.

Speed: filters are stored in the memory order of the FFT's output; attention runs in the fused kernel; `fuse()` folds the batch norms of the
stem.

Legend: B batch, N = h w tokens of a grid (h, w), C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vitarium.catalog import chain, family, join, rename
from vitarium.nn import (
    DropPath,
    EvalCache,
    MixerPyramid,
    Mlp,
    PatchEmbed,
    TokenBackbone,
    TransformerBlock,
    drop_path_rates,
    init_convs_by_fan_out,
    init_weights,
)
from vitarium.nn.backbone import POOLS
from vitarium.nn.mixer_pyramid import Grid, pyramid_rules
from vitarium.nn.positions import fit_position_table
from vitarium.ops.maps import as_map, as_tokens
from vitarium.ops.spectral import global_filter, resize_filter


class SpectralGate(nn.Module):
    """Learned filter in the Fourier domain, a token mixer: tokens (B, h w, dim) and their grid (h, w) -> the same shape.

    Args:
        dim: channels.
        grid: the grid (h, w) that the filter is made for; it is resized for others.
    """

    def __init__(self, dim: int, grid: Grid):
        super().__init__()
        self.complex_weight = nn.Parameter(0.02 * torch.randn(dim, grid[0], grid[1] // 2 + 1, 2))
        self.cache = EvalCache()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return as_tokens(global_filter(as_map(x, grid), self.filter(grid)))

    def filter(self, grid: Grid) -> Tensor:
        """Return the filter for a grid, (dim, h, w // 2 + 1, 2)."""
        half = (grid[0], grid[1] // 2 + 1)
        if half == tuple(self.complex_weight.shape[1:3]):
            return self.complex_weight
        exact = torch.promote_types(self.complex_weight.dtype, torch.float32)
        return self.cache.get(self, half, self.complex_weight, lambda: resize_filter(self.complex_weight.to(exact), half))

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Return the magnitude of the filter for visualisation: (dim, h, w // 2 + 1), the zero frequency at the left of the middle row."""
        return torch.linalg.vector_norm(self.complex_weight.float(), dim=-1).roll(self.complex_weight.shape[1] // 2, 1)


class SpectralBlock(nn.Module):
    """Spectral block, x + MLP(LN(Gate(LN(x)))): tokens (B, N, dim) of a grid -> the same shape."""

    def __init__(self, dim: int, grid: Grid, mlp_ratio: float, drop_path: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.filter = SpectralGate(dim, grid)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x), grid))))


def by_channel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Permute the authors' filters (h, w, C, 2) to (C, h, w, 2)."""
    return {name: t.permute(2, 0, 1, 3).contiguous() if name.endswith("complex_weight") else t for name, t in state.items()}


def resized_filter(name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """Resize a filter of a checkpoint to the grid of a model; return None for any other tensor."""
    if not name.endswith("complex_weight") or len(shape) != 4 or tensor.ndim != 4 or tensor.shape[0] != shape[0]:
        return None
    return resize_filter(tensor, (shape[1], shape[2])).contiguous()


@family(
    "spectformer",
    variants={
        "pico": dict(embed_dim=64, mixers="SSAA", num_heads=4, patch_size=4, image_size=16),
        "tiny": dict(embed_dim=256, num_heads=4),  # 9 M, 76.9 % top-1
        "xs": dict(embed_dim=384, num_heads=6),  # 20.0 M, 80.2 %
        "small": dict(embed_dim=384, num_heads=6, mixers="S" * 4 + "A" * 15, drop_path_rate=0.15),  # 32 M, 81.7 %
        "base": dict(embed_dim=512, num_heads=8, mixers="S" * 4 + "A" * 15, drop_path_rate=0.25),  # 57 M, 82.1 %; heads are not published
    },
    official=by_channel,
)
class SpectFormer(TokenBackbone):
    """SpectFormer classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        embed_dim, num_heads: channels and heads.
        mixers: one letter per block, S spectral or A attention, such as "SSSSAAAAAAAA".
        patch_size: side of a patch, pixels.
        image_size: side, in pixels, of the square image that filters and position table are made for.
        mlp_ratio: ratio of the MLP's hidden channels to embed_dim.
        norm_eps: epsilon of every layer norm.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: `mixers` is empty or has another letter.
    """

    pools = tuple(POOLS)

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        mixers: str = "SSSSAAAAAAAA",
        patch_size: int = 16,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not mixers or set(mixers) - set("SA"):
            raise ValueError(f"mixers must be one letter per block, S (spectral) or A (attention), such as 'SSAA'; got {mixers!r}")
        super().__init__(
            dim=embed_dim, depth=len(mixers), stride=patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
        )
        self.mixers = mixers
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        grid = self.table_grid = self.patch_embed.grid(image_size, image_size)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], embed_dim))
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [len(mixers)])
        self.blocks = nn.ModuleList(
            SpectralBlock(embed_dim, grid, mlp_ratio, rate, norm_eps)
            if letter == "S"
            else TransformerBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, drop_path=rate, eps=norm_eps)
            for letter, rate in zip(mixers, rates, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.global_pool = "avg"
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def class_places(self, patches: int) -> list[int]:
        return []

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table of a grid, (1, N, C), resampled unless the model was made for this grid."""
        return self.cache.for_grid(self, self.pos_embed, self.table_grid, grid)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block, (B, N, C)."""
        grid = self.patch_embed.grid(*image.shape[-2:])
        x = as_tokens(self.patch_embed(image)) + self.positions(grid)
        for letter, block in zip(self.mixers, self.blocks, strict=False):  # pruned models have fewer blocks
            x = self.run_blocks([block], x, grid) if letter == "S" else self.run_blocks([block], x)
            yield x

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a filter or position table of a checkpoint to the grid of this model; return None for any other tensor."""
        if name == "pos_embed":
            return fit_position_table(tensor, shape, self.table_grid)
        return resized_filter(name, tensor, shape)


_H = dict(mlp_ratios=(8, 8, 4, 4), mixers="SSAA")


@family(
    "spectformer",
    name="spectformer_h",
    variants={
        "pico": dict(
            depths=(1, 2), dims=(32, 64), num_heads=(2, 4), mlp_ratios=(4, 4), mixers="SA", stem_dim=16, patch_size=2, image_size=16
        ),
        # 21.8 M, 84.3 % top-1; 32.5 M, 85.0 %; 54.2 M, 85.7 %
        "small": dict(depths=(3, 4, 6, 3), dims=(64, 128, 320, 448), num_heads=(2, 4, 10, 14), stem_dim=32, drop_path_rate=0.1, **_H),
        "base": dict(depths=(3, 4, 12, 3), dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), drop_path_rate=0.2, **_H),
        "large": dict(depths=(3, 6, 18, 3), dims=(96, 192, 384, 512), num_heads=(3, 6, 12, 16), drop_path_rate=0.3, **_H),
    },
    official=chain(rename(*pyramid_rules(4)), join("qkv", "q", "kv"), by_channel),
)
class SpectFormerH(MixerPyramid):
    """Hierarchical SpectFormer: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Arguments as for `vitarium.nn.MixerPyramid`, with `SpectralGate` for the letter S.
    """

    letters = "SA"

    def make_mixer(self, letter: str, dim: int, num_heads: int, grid: Grid) -> nn.Module:
        return SpectralGate(dim, grid) if letter == "S" else super().make_mixer(letter, dim, num_heads, grid)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        return resized_filter(name, tensor, shape)
