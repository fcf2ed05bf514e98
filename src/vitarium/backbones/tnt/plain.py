"""TNT, with one resolution for all blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.backbones.tnt.blocks import EPS, PARTS, GatedMlp, Gather, Grid, Pair
from vitarium.catalog import chain, family, rename
from vitarium.catalog.registry import join
from vitarium.nn import (
    Attention,
    EvalCache,
    TokenBackbone,
    TransformerBlock,
    drop_path_rates,
    fit_position_table,
    init_weights,
)
from vitarium.ops.maps import as_tokens
from vitarium.ops.windows import pad_to_multiple


def block(dim: int, num_heads: int, mlp_ratio: float, drop_path: float, qkv_bias: bool, qk_scale: float | None) -> TransformerBlock:
    """Build a pre-norm transformer block."""
    attn = Attention(dim, num_heads, qkv_bias=qkv_bias, scale=qk_scale)
    return TransformerBlock(dim, num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path, attn=attn, eps=EPS)


class WordEmbed(nn.Module):
    """Embedding of images (B, in_chans, H, W): words (B N, n, c) and sentences (B, 1 + N, C), with positions.

    Args:
        patch_size: side of a sentence, pixels.
        stride: pixels between words.
        image_size: side, in pixels, of the square image that the position table is made for.
        in_chans, inner_dim, dim: channels of the image, c and C.
    """

    def __init__(self, patch_size: int, stride: int, image_size: int, in_chans: int, inner_dim: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.words = (-(-patch_size // stride)) ** 2
        self.table_grid = self.grid(image_size, image_size)
        self.proj = nn.Conv2d(in_chans, inner_dim, 7, stride, padding=3)
        self.gather = Gather(self.words * inner_dim, dim, bias=True)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.outer_pos = nn.Parameter(torch.empty(1, 1 + math.prod(self.table_grid), dim))
        self.inner_pos = nn.Parameter(torch.empty(1, self.words, inner_dim))
        self.cache = EvalCache()
        for table in (self.cls_token, self.outer_pos, self.inner_pos):
            nn.init.trunc_normal_(table, std=0.02)

    def grid(self, height: int, width: int) -> Grid:
        """Return the rows and columns of sentences of an image of height x width."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table of the sentences of a grid, (1, 1 + N, C)."""
        return self.cache.for_grid(self, self.outer_pos, self.table_grid, grid, prefix=1)

    def forward(self, image: Tensor) -> Pair:
        batch, channels, side = image.shape[0], image.shape[1], self.patch_size
        rows, columns = self.grid(*image.shape[-2:])
        image = pad_to_multiple(image.permute(0, 2, 3, 1), side).permute(0, 3, 1, 2)
        patches = image.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        words = as_tokens(self.proj(patches.reshape(batch * rows * columns, channels, side, side))) + self.inner_pos
        sentences = self.gather(words.reshape(batch, rows * columns, words.shape[1] * words.shape[2]))
        first = self.cls_token.expand(batch, -1, -1).to(sentences.dtype)
        return words, torch.cat([first, sentences], 1) + self.positions((rows, columns))


class TNTBlock(nn.Module):
    """TNT block: words (B N, n, c) and sentences (B, 1 + N, C) -> the same shapes.

    Args:
        dim, inner_dim, num_heads, inner_heads, se: see `TNT`.
        words: words per sentence n.
        options: mlp_ratio, drop_path, qkv_bias and qk_scale of both transformers.
    """

    def __init__(self, dim: int, inner_dim: int, words: int, num_heads: int, inner_heads: int, *, se: bool, **options: Any):
        super().__init__()
        self.inner = block(inner_dim, inner_heads, **options)
        self.gather = Gather(words * inner_dim, dim)
        self.outer = block(dim, num_heads, **options)
        if se:
            self.outer.mlp = GatedMlp(dim, int(dim * options["mlp_ratio"]))

    def forward(self, both: Pair) -> Pair:
        words, sentences = both
        words = self.inner(words)
        joined = words.reshape(sentences.shape[0], sentences.shape[1] - 1, words.shape[1] * words.shape[2])
        sentences = torch.cat([sentences[:, :1], sentences[:, 1:] + self.gather(joined)], 1)
        return words, self.outer(sentences)


OFFICIAL = chain(PARTS, rename((r"^(cls_token|outer_pos|inner_pos)$", r"patch_embed.\1")), join("qkv", "qk", "v"))

_TIMM = rename(
    (r"^patch_pos$", "patch_embed.outer_pos"),
    (r"^pixel_pos$", "patch_embed.inner_pos"),
    (r"^cls_token$", "patch_embed.cls_token"),
    (r"^pixel_embed\.", "patch_embed."),
    (r"^(.*blocks\.\d+)\.(norm|attn|mlp)_in\.", r"\1.inner.\2."),
    (r"^(.*blocks\.\d+)\.norm_mlp_in\.", r"\1.inner.norm2."),
    (r"^(.*blocks\.\d+)\.(norm|attn)_out\.", r"\1.outer.\2."),
    (r"^(.*blocks\.\d+)\.norm_mlp\.", r"\1.outer.norm2."),
    (r"^(.*blocks\.\d+)\.mlp\.", r"\1.outer.mlp."),
    (r"^(.*blocks\.\d+)\.norm([12])_proj\.", r"\1.gather.norm\2."),
    (r"^(.*blocks\.\d+)\.proj\.", r"\1.gather.proj."),
    (r"^norm([12])_proj\.", r"patch_embed.gather.norm\1."),
    (r"^proj\.", "patch_embed.gather.proj."),
)


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's checkpoints, whose word positions are a map (1, c, 4, 4)."""
    state = chain(_TIMM, rename((r"\.(inner|outer)\.norm\.", r".\1.norm1.")), join("qkv", "qk", "v"))(state)
    table = state.get("patch_embed.inner_pos")
    if table is not None and table.ndim == 4:
        state["patch_embed.inner_pos"] = as_tokens(table)
    return state


@family(
    "tnt",
    variants={
        "pico": dict(dim=64, inner_dim=8, depth=3, num_heads=4, inner_heads=2, patch_size=4, stride=1, mlp_ratio=2, image_size=16),
        "s_patch16": dict(dim=384, inner_dim=24, num_heads=6, drop_path_rate=0.1),  # 23.8 M, 81.5 % top-1
        "b_patch16": dict(dim=640, inner_dim=40, num_heads=10, drop_path_rate=0.1),  # 65.4 M, 82.9 %
    },
    official=OFFICIAL,
    dialects={"timm": from_timm},
    weights={f"{size}_patch16": {"in1k": (f"timm:tnt_{size}_patch16_224.in1k",)} for size in ("s", "b")},
    crop_pct=0.9,
)
class TNT(TokenBackbone):
    """TNT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Features are the sentences, the class token first; `forward_levels` also returns the words.

    Args:
        dim, inner_dim: channels of sentences and of words.
        num_heads, inner_heads: heads of the outer and of the inner attention.
        depth: blocks.
        patch_size, stride: side of a sentence and distance between words, pixels.
        mlp_ratio: ratio of hidden channels to channels in all MLPs.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the logits of all attentions; None: head_dim ** -0.5.
        se: gate the channels of the outer MLPs' outputs by the mean of the tokens (squeeze-and-excitation).
        image_size: side, in pixels, of the square image that the position table is made for.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: channels that are not divisible by their heads.
    """

    patch_embed: WordEmbed  # type: ignore[assignment]

    def __init__(
        self,
        *,
        dim: int,
        inner_dim: int,
        num_heads: int,
        inner_heads: int = 4,
        depth: int = 12,
        patch_size: int = 16,
        stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        se: bool = False,
        image_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(dim=dim, depth=depth, stride=patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.patch_embed = WordEmbed(patch_size, stride, image_size, in_chans, inner_dim, dim)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        options: dict[str, Any] = dict(se=se, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.blocks = nn.ModuleList(
            TNTBlock(dim, inner_dim, self.patch_embed.words, num_heads, inner_heads, drop_path=rate, **options) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        init_weights(self, conv=False)

    def forward_levels(self, image: Tensor) -> Pair:
        """Return the words (B N, n, c) and the normed sentences (B, 1 + N, C) after the last block."""
        self.check_image(image)
        for both in self._levels(image):  # noqa: B007
            pass
        return both[0], self.norm(both[1])

    def _levels(self, image: Tensor) -> Iterator[Pair]:
        both: Any = self.patch_embed(image)
        for part in self.blocks:
            both = self.run_blocks([part], both)
            yield both

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the sentences after each block, (B, 1 + N, C), the class token first."""
        for _, sentences in self._levels(image):
            yield sentences

    def no_weight_decay(self) -> set[str]:
        return {"patch_embed.outer_pos", "patch_embed.inner_pos", "patch_embed.cls_token"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        return fit_position_table(tensor, shape, self.patch_embed.table_grid, prefix=1) if name == "patch_embed.outer_pos" else None
