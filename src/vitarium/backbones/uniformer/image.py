"""UniFormer for images: classification, token labelling, and normed maps for dense tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.backbones.uniformer.blocks import (
    OFFICIAL,
    Convolutions,
    GlobalBlock,
    LocalBlock,
    Patches,
    channels_last,
    check_stages,
)
from vitarium.catalog import family
from vitarium.nn import Backbone, LayerNorm2d, PyramidStage, Stage, drop_path_rates, init_weights

SMALL = dict(depths=(3, 4, 8, 3), dims=(64, 128, 320, 512))
PLUS = dict(depths=(3, 5, 9, 3), dims=(64, 128, 320, 512), conv_stem=True)
BASE = dict(depths=(5, 8, 20, 7), dims=(64, 128, 320, 512))
LARGE = dict(depths=(5, 10, 24, 7), dims=(128, 192, 448, 640), layer_scale=1e-6)
PICO = dict(depths=(2, 2), dims=(32, 64), mixers="LG", head_dim=16, patch_size=2, image_size=16)


@family(
    "uniformer",
    variants={
        "pico": PICO,
        "small": SMALL,  # 21.5 M, 82.9 % top-1
        "small_plus": dict(**PLUS, head_dim=32),  # 24.0 M, 83.4 %
        "small_plus_dim64": PLUS,  # 83.4 %, less memory
        "base": dict(**BASE, drop_path_rate=0.3),  # 50 M, 83.8 %
        "base_ls": dict(**BASE, layer_scale=1e-6, local_layer_scale=False, drop_path_rate=0.3),  # 83.9 %
    },
    official=OFFICIAL,
    weights={
        "small": {"in1k": ("hf:Sense-X/uniformer_image/uniformer_small_in1k.pth",)},
        "base": {"in1k": ("hf:Sense-X/uniformer_image/uniformer_base_in1k.pth",)},
    },
)
class UniFormer(Backbone):
    """UniFormer classifier: images (B, in_chans, H, W) -> logits (B, num_classes).

    H and W must be at least the stride of the last stage (32), except with `conv_stem`. If a stride does not divide its map, the remainder
    at the right and the bottom is dropped, as in the authors' code; `conv_stem` rounds up.

    Args:
        depths, dims: blocks and channels per stage.
        mixers: "L" (local) or "G" (global) for each stage.
        head_dim: channels per head.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels.
        patch_size: stride of the stem, pixels.
        conv_stem: overlapping 3 x 3 convolutions with batch norms in place of patch embeddings, in the stem and between stages.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the logits of the attention; None: head_dim ** -0.5.
        layer_scale: initial value of the layer scales; 0 for none.
        local_layer_scale: whether local blocks have layer scales, too: in the authors' models for token labelling, not in the others.
        attention: of the global stages except the last: "global", "window", or "hybrid" (every fourth block global).
        window_size: side of a window, tokens.
        drop_rate: dropout after the stem, in projections and MLPs, and before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, channels that are not divisible by head_dim, or another `mixers` or `attention`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: str = "LLGG",
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        conv_stem: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float = 0.0,
        local_layer_scale: bool = True,
        attention: str = "global",
        window_size: int = 14,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        check_stages(depths, dims, mixers, head_dim)
        if attention not in ("global", "window", "hybrid"):
            raise ValueError(f"attention must be 'global', 'window' or 'hybrid', got {attention!r}")
        strides = [patch_size * 2**k for k in range(len(dims))]
        stages = [Stage(dim, stride) for dim, stride in zip(dims, strides, strict=True)]
        least = 1 if conv_stem else strides[-1]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=least)
        local: dict[str, Any] = dict(mlp_ratio=mlp_ratio, layer_scale=layer_scale if local_layer_scale else 0.0, drop=drop_rate)
        wide: dict[str, Any] = dict(mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop=drop_rate, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.stem = Convolutions(in_chans, dims[0], 2, patch_size // 2) if conv_stem else Patches(in_chans, dims[0], patch_size)
        self.stages = nn.ModuleList()
        for k, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks: list[nn.Module] = []
            for i, rate in enumerate(rates):
                inside = attention == "window" or (attention == "hybrid" and (i + 1) % 4 != 0)
                window = window_size if inside and k < len(dims) - 1 else None
                blocks.append(
                    LocalBlock(dims[k], 2, **local, drop_path=rate)
                    if mixers[k] == "L"
                    else GlobalBlock(dims[k], 2, head_dim, window_size=window, **wide, drop_path=rate)
                )
            between = Convolutions(dims[k - 1], dims[k], 2) if conv_stem else Patches(dims[k - 1], dims[k], 2)
            self.stages.append(PyramidStage(between if k else nn.Identity(), blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.add_parts()
        init_weights(self, conv=False)

    def add_parts(self) -> None:
        """Add the submodules of a subclass."""

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        x = F.dropout(x, self.drop_rate, self.training)
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x


@family(
    "uniformer",
    name="uniformer_tl",
    variants={
        "pico": PICO,
        "small": dict(**SMALL, head_dim=32),  # 83.4 % top-1
        "small_384": dict(**SMALL, head_dim=32, image_size=384),  # 84.6 %
        "small_dim64": SMALL,  # 83.4 %
        "small_plus": dict(**PLUS, head_dim=32),  # 83.9 %
        "small_plus_384": dict(**PLUS, head_dim=32, image_size=384),  # 84.9 %
        "small_plus_dim64": PLUS,  # 83.6 %
        "base": dict(**BASE, head_dim=32, drop_path_rate=0.3),  # 85.1 %
        "base_384": dict(**BASE, head_dim=32, drop_path_rate=0.3, image_size=384),  # 86.0 %
        "base_dim64": dict(**BASE, drop_path_rate=0.3),  # 84.8 %
        "large": LARGE,  # 100 M, 85.6 %
        "large_384": dict(**LARGE, image_size=384),  # 86.3 %
    },
    official=OFFICIAL,
)
class UniFormerTokenLabel(UniFormer):
    """UniFormer with a second head for every token: logits = head(mean) + 0.5 max over tokens of aux_head.

    Arguments as for `UniFormer`.
    """

    def add_parts(self) -> None:
        self.aux_head = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    @property
    def first_tokens(self) -> tuple[nn.Module, tuple[int, int]]:
        """The stem, whose output MixToken mixes (see `vitarium.training.token_labelling`), and its axes of height and width."""
        return self.stem, (2, 3)

    def forward_dense(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the image (B, num_classes) and of each token (B, H, W, num_classes) of the last map (B, C, H, W)."""
        return super().forward_head(features), self.aux_head(channels_last(features))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or not self.num_classes:
            return super().forward_head(features, pre_logits)
        logits, tokens = self.forward_dense(features)
        return logits + 0.5 * tokens.flatten(1, 2).amax(1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.add_parts()
        init_weights(self.aux_head.to(next(self.parameters())))


@family(
    "uniformer",
    name="uniformer_dense",
    variants={
        "pico": dict(**PICO, attention="hybrid", window_size=4),
        "small": SMALL,  # 45.6 box AP with Mask R-CNN 1x as h14
        "small_w14": dict(**SMALL, attention="window"),
        "small_h14": dict(**SMALL, attention="hybrid"),
        "small_w32": dict(**SMALL, attention="window", window_size=32),
        "small_h32": dict(**SMALL, attention="hybrid", window_size=32),
        "base": BASE,  # 50.0 mIoU on ADE20K with UperNet
        "base_w14": dict(**BASE, attention="window"),
        "base_h14": dict(**BASE, attention="hybrid"),
        "base_w32": dict(**BASE, attention="window", window_size=32),
        "base_h32": dict(**BASE, attention="hybrid", window_size=32),
    },
    official=OFFICIAL,
)
class UniFormerDense(UniFormer):
    """UniFormer for dense tasks, with a layer norm on the map of each stage. Arguments as for `UniFormer`.

    The authors' detection and segmentation checkpoints have no classifier: load them with num_classes=0.
    """

    def add_parts(self) -> None:
        self.norms = nn.ModuleList(LayerNorm2d(info["num_chs"], eps=1e-6) for info in self.feature_info)
        self.norm = nn.Identity()

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        for norm, x in zip(self.norms, super().forward_stages(image), strict=True):
            yield norm(x)
