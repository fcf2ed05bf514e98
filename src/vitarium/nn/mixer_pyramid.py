"""Wave-ViT's pyramid, used by hierarchical SpectFormer and SVT: stages whose token mixers are chosen by one letter per stage.

A convolutional stem, a strided convolution before each later stage, blocks of a token mixer and an MLP with a depth-wise convolution, no
position embedding. A class token, initialised to the mean of the last map, attends to it once.

    x <- x + Mixer(LN(x));  x <- x + MLP(LN(x))
    c = mean(x);  c <- c + W_o softmax(W_q LN(c) (W_k LN([c; x]))^T / sqrt(d)) W_v LN([c; x]);  c <- c + MLP(LN(c));  logits = W LN(c)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.nn.attention import Attention
from vitarium.nn.backbone import POOLS, Backbone, Stage, init_head
from vitarium.nn.folding import fold_pair
from vitarium.nn.layers import DropPath, Linear, Mlp, drop_path_rates, init_convs_by_fan_out, init_weights
from vitarium.nn.pvt import Grid, GridMlp, OverlapPatchEmbed, pvt_rules
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens

EPS = 1e-6
"""Usual epsilon of every norm except those after strided convolutions."""


class GridAttention(Attention):
    """Self-attention with the signature of a token mixer, which ignores the grid: (B, N, dim), (H, W) -> (B, N, dim)."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class MixerBlock(nn.Module):
    """Pre-norm block of a token mixer, called as mixer(tokens, grid), and a `GridMlp`: (B, N, dim) of a grid -> the same shape."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, eps: float = EPS):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = GridMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class Stem(OverlapPatchEmbed):
    """Stem of three convolutions with batch norms, the first 7 x 7, and a strided convolution; total stride `patch_size`, 2 or 4."""

    def __init__(self, in_chans: int, stem_dim: int, dim: int, patch_size: int):
        layers: list[nn.Module] = []
        for i in range(3):
            kernel, stride = (3, 1) if i else (7, patch_size // 2)
            conv = nn.Conv2d(stem_dim if i else in_chans, stem_dim, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(stem_dim), nn.ReLU()]
        super().__init__(stem_dim, dim, conv=nn.Sequential(*layers))

    def fold(self) -> None:
        """Fold the batch norms into the convolutions."""
        for i in (0, 3, 6):
            fold_pair(self.conv, str(i), str(i + 1))


class MixerStage(nn.Module):
    """Downsampling, blocks and an optional norm: map (B, C_in, H, W) -> map (B, C, h, w)."""

    def __init__(self, downsample: OverlapPatchEmbed, blocks: Sequence[MixerBlock], norm: nn.Module | None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x)
        grid = (x.shape[1], x.shape[2])
        x = run(self.blocks, x.flatten(1, 2), grid)
        return as_map(x if self.norm is None else self.norm(x), grid)


class ClassReader(nn.Module):
    """Class attention: the mean of all tokens attends to them once, (B, N, dim) -> (B, dim). Equations above."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = EPS):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.query, self.key_value, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(1, keepdim=True)
        y = self.norm1(torch.cat([token, x], 1))
        k, v = self.key_value(y).chunk(2, 2)
        token = token + self.proj(multi_head_attention(self.query(y[:, :1]), k, v, self.num_heads))
        return (token + self.mlp(self.norm2(token)))[:, 0]


class MixerPyramid(Backbone):
    """Pyramid of token mixers: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    A subclass adds its own mixer by `letters` and `make_mixer`.

    Args:
        depths, dims, num_heads: blocks, channels and heads per stage.
        mlp_ratios: ratio of the MLP's hidden channels to channels, per stage.
        mixers: one letter per stage: A for attention, S for the mixer of the subclass.
        stem_dim: channels inside the stem.
        patch_size: stride of the stem, pixels, 2 or 4.
        image_size: side, in pixels, of the square image that mixers with a fixed grid are made for.
        token_label: add a second head for every token, as in token labelling: the logits are then those of the class token plus half the
            maximum over the tokens.
        norm_eps: epsilon of the layer norms of blocks, stages and head; 1e-6 as released, 1e-5 by default in the authors' classes.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, another letter, another patch_size, or dims that are not divisible by their num_heads.
    """

    pools = ("token", *POOLS)
    letters = "A"

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        mixers: str,
        stem_dim: int = 64,
        patch_size: int = 4,
        image_size: int = 224,
        token_label: bool = False,
        norm_eps: float = EPS,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len({len(row) for row in (depths, dims, num_heads, mlp_ratios, mixers)}) > 1:
            raise ValueError(
                "depths, dims, num_heads, mlp_ratios and mixers need one value per stage, "
                f"got {depths}, {dims}, {num_heads}, {mlp_ratios}, {mixers!r}"
            )
        if wrong := set(mixers) - set(self.letters):
            raise ValueError(f"mixers must be one letter per stage out of {', '.join(self.letters)}; got {min(wrong)!r} in {mixers!r}")
        if patch_size not in (2, 4):
            raise ValueError(f"patch_size must be 2 or 4, got {patch_size}")
        stages = [Stage(dim, patch_size * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.token_label = token_label
        rates, last = drop_path_rates(drop_path_rate, depths), len(dims) - 1
        built = []
        for k, (dim, stage) in enumerate(zip(dims, stages, strict=True)):
            side = -(-image_size // stage.stride)
            make = lambda k=k, dim=dim, side=side: self.make_mixer(mixers[k], dim, num_heads[k], (side, side))
            blocks = [MixerBlock(dim, make(), mlp_ratios[k], rate, norm_eps) for rate in rates[k]]
            downsample = OverlapPatchEmbed(dims[k - 1], dim) if k else Stem(in_chans, stem_dim, dim, patch_size)
            built.append(MixerStage(downsample, blocks, None if k == last else nn.LayerNorm(dim, eps=norm_eps)))
        self.stages = nn.ModuleList(built)
        self.class_reader = ClassReader(dims[-1], num_heads[-1], mlp_ratios[-1], norm_eps)
        self.head_norm = nn.LayerNorm(dims[-1], eps=norm_eps)
        self.global_pool = "token"
        self.add_aux_head()
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)

    def make_mixer(self, letter: str, dim: int, num_heads: int, grid: Grid) -> nn.Module:
        """Build a token mixer, called as mixer(tokens, grid); `grid` is that of an image of image_size. Subclasses handle "S"."""
        return GridAttention(dim, num_heads)

    def add_aux_head(self) -> None:
        """Build the second head if `token_label` is set."""
        if self.token_label:
            self.aux_head: nn.Module = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def pool(self, features: Tensor) -> Tensor:
        """Pool a map by the class token that attends to it ("token"), its mean or its maximum: (B, C, h, w) -> (B, C)."""
        return self.class_reader(as_tokens(features)) if self.global_pool == "token" else super().pool(features)

    @property
    def first_tokens(self) -> tuple[nn.Module, tuple[int, int]]:
        """The stem, whose output MixToken mixes (see `vitarium.training.token_labelling`), and its axes of height and width."""
        return self.stages[0].downsample, (1, 2)  # type: ignore[return-value]

    def forward_dense(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the class token (B, num_classes) and of each token (B, h w, num_classes) of the last map (B, C, h, w)."""
        return super().forward_head(features), self.aux_head(self.head_norm(as_tokens(features)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or not (self.token_label and self.num_classes):
            return super().forward_head(features, pre_logits)
        logits, tokens = self.forward_dense(features)
        return logits + 0.5 * tokens.amax(1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.add_aux_head()
        if self.token_label and isinstance(self.aux_head, nn.Linear):
            init_head(self.aux_head.to(next(self.parameters())))


def pyramid_rules(stages: int) -> list[tuple[str, Any]]:
    """Return rules for `rename` from the names of Wave-ViT, SVT and SpectFormer to ours, with separate q and kv projections."""
    rules: list[tuple[str, Any]] = [
        (r"^post_network\.0\.attn\.q\.", "class_reader.query."),
        (r"^post_network\.0\.attn\.kv\.", "class_reader.key_value."),
        (r"^post_network\.0\.attn\.proj\.", "class_reader.proj."),
        (r"^post_network\.0\.", "class_reader."),
        (rf"^norm{stages}\.", "head_norm."),
    ]
    return rules + pvt_rules(stages)
