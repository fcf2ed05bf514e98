"""Swin Transformer: attention inside shifted windows (Liu et al., "Hierarchical Vision Transformer using Shifted Windows", 2021).

The idea: attention inside M x M windows, at a cost linear in image area; every second block shifts the windows by half their size, which
connects neighbouring windows. Tokens are merged 2 x 2 between stages, for a pyramid of strides 4, 8, 16, 32.

    x <- x + WindowAttention(LN(x))       softmax(q k^T / sqrt(d) + table[query - key] + mask) v
    x <- x + MLP(LN(x))

Swin-MLP has the same architecture with attention replaced by one learned M^2 x M^2 matrix per head.

Follows the authors' code (github microsoft/Swin-Transformer); its checkpoints load by name: classifiers, detectors and segmenters
(`stage_norms`; only the backbone is read), and SimMIM's (mask token and decoder are dropped). Any image size: maps are padded with zeros
after the norm, as in torchvision and the authors' detection code. The authors' classifier narrows the windows of a stage whose map is
smaller, at construction; here they are given per stage (SimMIM's Swin-L at 192 pixels: 12, 12, 12, 6).
Left out: dropout of the attention weights, which no config uses; Swin V2 and Swin-MoE, which are other models of the same repository; the
geometric resizing of bias tables in SimMIM's fine-tuning (it is bicubic here, as in the authors' main code).
Cost: linear in image area at a fixed window size.

Speed: a stage keeps its tokens in window order and permutes them only where the shift changes, instead of rolling, partitioning and
reversing both in each block; the bias, including the mask, is gathered once in evaluation mode.

Legend: B batch, H W map, N = H' W' tokens of the padded map, C channels, M window side, n = M * M, nW = N / n windows, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import chain, family, join, part_of, rename
from vitarium.nn import (
    Backbone,
    DropPath,
    EvalCache,
    LayerNorm2d,
    LayoutCache,
    Linear,
    Mlp,
    PatchEmbed,
    RelativePositionBias,
    Stage,
    WindowAttention,
    drop_path_rates,
    init_weights,
    per_stage,
)
from vitarium.nn.positions import fit_position_table, resize_bias_table
from vitarium.ops.windows import WindowLayout, pad_to_multiple, window_layout, window_partition, window_reverse


class SwinBlock(nn.Module):
    """Swin block on tokens in window order: (B, N, C) -> the same shape."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        drop_path: float,
        *,
        qk_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, qkv_bias=qkv_bias, scale=qk_scale)
        self.attn.proj_drop = drop
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        y = self.norm1(x)
        if layout.inside is not None:
            y = y * layout.inside  # padding is zero after the norm and an unmasked key
        x = x + self.drop_path(self.attn(y, layout))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Merging of 2 x 2 neighbouring tokens: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2)
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)  # (column, row) parity: the authors' order
        return self.reduction(self.norm(x.reshape(batch, height // 2, width // 2, 4 * dim)))


class SwinStage(nn.Module):
    """Downsampling and blocks, every second one with shifted windows: (B, H, W, C_in) -> (B, H', W', C)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window_size: int):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.window_size = window_size
        self.shifted = True
        self.kept = LayoutCache()

    def shift(self, height: int, width: int) -> tuple[int, int]:
        """Return the shift of the windows on each axis: half a window, or 0 if one window covers the map.

        Without padding this is the authors' rule (no shift if a window covers the shorter side), with padding torchvision's (each axis
        separately).
        """
        size, half = self.window_size, self.window_size // 2
        if not self.shifted or (height % size == 0 and width % size == 0 and min(height, width) <= size):
            return 0, 0
        return (half if height > size else 0), (half if width > size else 0)

    def layouts(self, height: int, width: int, device: torch.device) -> tuple[WindowLayout, WindowLayout]:
        """Return the unshifted and the shifted layout of a map."""

        def build() -> tuple[WindowLayout, WindowLayout]:
            still = window_layout(height, width, self.window_size, (0, 0), device)
            shift = self.shift(height, width)
            return still, window_layout(height, width, self.window_size, shift, device) if any(shift) else still

        return self.kept.get(height, width, device, build)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x)
        height, width = x.shape[1:3]
        layouts = self.layouts(height, width, x.device)
        x = pad_to_multiple(x, self.window_size)
        padded = x.shape
        place = layouts[0]
        x = x.flatten(1, 2).index_select(1, place.order)
        for i, block in enumerate(self.blocks):
            layout = layouts[i % 2]
            if layout is not place:
                x = x.index_select(1, place.inverse[layout.order])
                place = layout
            x = run([block], x, layout)
        return x.index_select(1, place.inverse).view(padded)[:, :height, :width]


class SpatialMlp(nn.Conv1d):
    """Learned n x n matrix per head over the positions of a window, as a grouped convolution: (B * nW, n, C) -> the same shape."""

    def __init__(self, num_heads: int, window_size: int):
        super().__init__(num_heads * window_size**2, num_heads * window_size**2, 1, groups=num_heads)

    def forward(self, windows: Tensor) -> Tensor:
        count, n, dim = windows.shape
        heads, head_dim = self.groups, dim // self.groups
        x = windows.view(count, n, heads, head_dim).transpose(1, 2).reshape(count, heads * n, head_dim)
        return super().forward(x).view(count, heads, n, head_dim).transpose(1, 2).reshape(count, n, dim)


class SwinMlpBlock(nn.Module):
    """Swin block with a spatial MLP in place of attention: (B, H, W, C) -> the same shape.

    A shift pads the map instead of rolling and masking it.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim)
        self.spatial_mlp = SpatialMlp(num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, shift: tuple[int, int]) -> Tensor:
        height, width, size = x.shape[1], x.shape[2], self.window_size
        top, left = (size - s if s else 0 for s in shift)
        y = pad_to_multiple(F.pad(self.norm1(x), (0, 0, left, 0, top, 0)), size)
        y = window_reverse(self.spatial_mlp(window_partition(y, size)), size, *y.shape[1:3])
        x = x + self.drop_path(y[:, top : top + height, left : left + width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinMlpStage(SwinStage):
    """Downsampling and Swin-MLP blocks: (B, H, W, C_in) -> (B, H', W', C)."""

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x)
        moved = self.shift(*x.shape[1:3])
        for i, block in enumerate(self.blocks):
            x = run([block], x, moved if i % 2 else (0, 0))
        return x


def _layers(*renames: tuple[str, str | None]):
    """Build a renamer of the authors' names, layers.K.blocks.I...; timm's differ in the place of the merging layers."""
    return rename(
        (r"relative_position_index$|attn_mask$", None),
        *renames,
        (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$", r"stages.\1.blocks.\2.attn.position_bias.table"),
        (r"^layers\.", "stages."),
    )


OFFICIAL = chain(
    part_of("backbone."),  # of a detector or segmenter
    rename((r"^decoder\.0\.(weight|bias)$|^(encoder\.)?mask_token$", None), (r"^encoder\.", "")),  # SimMIM
    _layers(
        (r"^absolute_pos_embed$", "pos_embed"),
        (r"^norm(\d)\.", r"stage_norms.\1."),
        *((rf"^layers\.{k}\.downsample\.", f"stages.{k + 1}.downsample.") for k in range(9)),
    ),
)
TIMM = _layers((r"^head\.fc\.", "head."))
TORCHVISION = rename(
    (r"relative_position_index$", None),
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * k}\.", f"stages.{k}.downsample.") for k in (1, 2, 3)),
    *(
        rule
        for k in range(4)
        for rule in (
            (rf"^features\.{2 * k + 1}\.(\d+)\.attn\.relative_position_bias_table$", rf"stages.{k}.blocks.\1.attn.position_bias.table"),
            (rf"^features\.{2 * k + 1}\.(\d+)\.mlp\.0\.", rf"stages.{k}.blocks.\1.mlp.fc1."),
            (rf"^features\.{2 * k + 1}\.(\d+)\.mlp\.3\.", rf"stages.{k}.blocks.\1.mlp.fc2."),
            (rf"^features\.{2 * k + 1}\.(\d+)\.", rf"stages.{k}.blocks.\1."),
        )
    ),
)
_LAYER = r"^(?:swin\.)?encoder\.layers\.(\d+)\.blocks\.(\d+)\."
TRANSFORMERS = chain(
    join("qkv", "query", "key", "value"),
    rename(
        (r"relative_position_index$|^(?:swin\.)?embeddings\.mask_token$|^decoder\.0\.(weight|bias)$", None),
        (r"^(?:swin\.)?embeddings\.position_embeddings$", "pos_embed"),
        (r"^(?:swin\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(?:swin\.)?embeddings\.norm\.", "patch_embed.norm."),
        (_LAYER + r"layernorm_before\.", r"stages.\1.blocks.\2.norm1."),
        (_LAYER + r"layernorm_after\.", r"stages.\1.blocks.\2.norm2."),
        (_LAYER + r"attention\.self\.qkv\.", r"stages.\1.blocks.\2.attn.qkv."),
        (_LAYER + r"attention\.self\.relative_position_bias_table$", r"stages.\1.blocks.\2.attn.position_bias.table"),
        (_LAYER + r"attention\.output\.dense\.", r"stages.\1.blocks.\2.attn.proj."),
        (_LAYER + r"intermediate\.dense\.", r"stages.\1.blocks.\2.mlp.fc1."),
        (_LAYER + r"output\.dense\.", r"stages.\1.blocks.\2.mlp.fc2."),
        *((rf"^(?:swin\.)?encoder\.layers\.{k}\.downsample\.", f"stages.{k + 1}.downsample.") for k in range(3)),
        (r"^(?:swin\.)?layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    ),
)
DIALECTS = {"timm": TIMM, "torchvision": TORCHVISION, "transformers": TRANSFORMERS}


def _tags(timm_name: str, *tags: str, hf: str = "") -> dict[str, tuple[str, ...]]:
    """Return tag -> sources; timm's table also contains the addresses of the authors' releases."""
    first = (f"hf:microsoft/{hf}",) if hf else ()
    return {tag: (f"timm:{timm_name}.ms_{tag}", *(first if i == 0 else ())) for i, tag in enumerate(tags)}


@family(
    "swin",
    variants={
        "pico": dict(embed_dim=40, depths=(2, 2), num_heads=(2, 4), window_size=2, drop_path_rate=0.0, image_size=16),
        "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),  # 28.3 M, 81.2 % top-1
        "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),  # 50 M, 83.2 %
        "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),  # 88 M, 83.5 %
        "base_384": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12, image_size=384),  # 84.5 %
        "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),  # 197 M, 86.3 % from 22K
        "large_384": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12, image_size=384),  # 87.3 %
        "tiny_c24": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(4, 8, 16, 32), window_size=8, image_size=256),
        "base_192": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=6, image_size=192),  # SimMIM's
        "large_192": dict(  # SimMIM's
            embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=(12, 12, 12, 6), image_size=192
        ),
    },
    official=OFFICIAL,
    dialects=DIALECTS,
    weights={
        "tiny": _tags("swin_tiny_patch4_window7_224", "in1k", "in22k", "in22k_ft_in1k", hf="swin-tiny-patch4-window7-224"),
        "small": _tags("swin_small_patch4_window7_224", "in1k", "in22k", "in22k_ft_in1k", hf="swin-small-patch4-window7-224"),
        "base": _tags("swin_base_patch4_window7_224", "in1k", "in22k", "in22k_ft_in1k", hf="swin-base-patch4-window7-224"),
        "base_384": _tags("swin_base_patch4_window12_384", "in1k", "in22k", "in22k_ft_in1k", hf="swin-base-patch4-window12-384"),
        "large": _tags("swin_large_patch4_window7_224", "in22k_ft_in1k", "in22k", hf="swin-large-patch4-window7-224"),
        "large_384": _tags("swin_large_patch4_window12_384", "in22k_ft_in1k", "in22k", hf="swin-large-patch4-window12-384"),
        "base_192": {"simmim": ("hf:microsoft/swin-base-simmim-window6-192",)},
    },
    crop_pct=0.875,
)
class Swin(Backbone):
    """Swin classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    The arguments are over 15 so that the authors' files and configs can be expressed.

    Args:
        embed_dim: channels C of the first stage; each later stage doubles them.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_size: side M of a window, tokens; one for all stages or one per stage.
        patch_size: side of a patch, pixels.
        mlp_ratio: ratio of the MLP's hidden channels to C.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the attention logits; None: head_dim ** -0.5.
        patch_norm: whether a layer norm follows the patch embedding.
        pos_embed: whether a learned absolute position is added to each patch (`ape` of the authors).
        image_size: side, or (height, width), in pixels, of the image that the position table is made for; it is resampled for others.
        stage_norms: whether the map of each stage gets its own layer norm in place of the final one, as in the authors' detectors and
            segmenters; the next stage reads the map before the norm.
        shifted: whether every second block shifts the windows; False for the paper's ablation.
        position_bias: whether the bias tables are learned; False keeps them at zero, for the paper's ablation.
        drop_rate: dropout after the patch embedding, after each projection, in the MLPs and before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, or the channels of a stage are not divisible by its heads.
    """

    imagenet_22k = "imagenet-21k-goog"  # the order of the authors' list of classes

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int] = 7,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        pos_embed: bool = False,
        image_size: int | Sequence[int] = 224,
        stage_norms: bool = False,
        shifted: bool = True,
        position_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        if len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads need one value per stage, got {depths} and {num_heads}")
        sizes = per_stage(window_size, len(depths), "window_size")
        dims = [embed_dim * 2**k for k in range(len(depths))]
        stages = [Stage(dim, patch_size * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm=patch_norm)
        self.table_grid = self.patch_embed.grid(*per_stage(image_size, 2, "image_size"))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.table_grid), embed_dim)) if pos_embed else None
        self.cache = EvalCache()
        options = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale, drop=drop_rate)
        self.stages = nn.ModuleList(
            self._stage(dims[k], num_heads[k], sizes[k], rates, PatchMerging(dims[k] // 2) if k else nn.Identity(), options)
            for k, rates in enumerate(drop_path_rates(drop_path_rate, depths))
        )
        self.stage_norms = nn.ModuleList(LayerNorm2d(dim) if stage_norms else nn.Identity() for dim in dims)
        self.norm = nn.Identity() if stage_norms else LayerNorm2d(dims[-1])
        init_weights(self, conv=False)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for part in self.modules():
            if isinstance(part, SwinStage):
                part.shifted = shifted
            if isinstance(part, RelativePositionBias) and not position_bias:
                nn.init.zeros_(part.table.requires_grad_(False))

    def _stage(self, dim: int, heads: int, size: int, rates: list[float], downsample: nn.Module, options: Mapping[str, Any]) -> SwinStage:
        return SwinStage(downsample, [SwinBlock(dim, heads, size, drop_path=rate, **options) for rate in rates], size)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table of a grid as a map, (1, h, w, C), resampled unless the model was made for this grid."""
        table = self.cache.for_grid(self, cast(Tensor, self.pos_embed), self.table_grid, grid)
        return table.unflatten(1, grid)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(image).permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            x = x + self.positions(self.patch_embed.grid(*image.shape[-2:]))
        x = F.dropout(x, self.drop_rate, self.training)
        for stage, norm in zip(self.stages, self.stage_norms, strict=False):
            x = stage(x, self.run_blocks)
            yield norm(x.permute(0, 3, 1, 2))

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("position_bias.table", "pos_embed"))}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a bias or position table of a checkpoint to this model; return None for any other tensor."""
        if name == "pos_embed":
            return fit_position_table(tensor, shape, self.table_grid)
        return resize_bias_table(tensor, shape[0]) if name.endswith("position_bias.table") and tensor.shape[1:] == shape[1:] else None


@family(
    "swin",
    name="swin_mlp",
    variants={
        "pico": dict(embed_dim=32, depths=(2, 2), num_heads=(4, 8), window_size=4, patch_size=2, drop_path_rate=0.0, image_size=16),
        "tiny_c24": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(4, 8, 16, 32), window_size=8, image_size=256),  # 20 M, 79.4 % top-1
        "tiny_c12": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(8, 16, 32, 64), window_size=8, image_size=256),  # 21 M, 79.6 %
        "tiny_c6": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(16, 32, 64, 128), window_size=8, image_size=256),  # 23 M, 79.7 %
        "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),  # 61 M, 81.3 %
    },
    official=OFFICIAL,
    crop_pct=0.875,
)
class SwinMlp(Swin):
    """Swin-MLP classifier, with spatial MLPs in place of attention. Arguments as for `Swin`; qkv_bias and qk_scale are ignored."""

    def _stage(self, dim: int, heads: int, size: int, rates: list[float], downsample: nn.Module, options: Mapping[str, Any]) -> SwinStage:
        blocks = [SwinMlpBlock(dim, heads, size, options["mlp_ratio"], options["drop"], rate) for rate in rates]
        return SwinMlpStage(downsample, blocks, size)
