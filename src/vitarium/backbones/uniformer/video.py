"""UniFormer for clips: kernels with a time axis, attention over time and space.

Legend: B batch, C channels, T frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.backbones.uniformer.blocks import OFFICIAL, DividedBlock, GlobalBlock, LocalBlock, Patches, check_stages
from vitarium.backbones.uniformer.image import BASE, PICO, SMALL
from vitarium.catalog import family
from vitarium.nn import PyramidStage, Stage, VideoBackbone, drop_path_rates, init_weights


def _weights(*names: str) -> dict[str, tuple[str, ...]]:
    """Return tag -> sources; the tag is the data set in a file name such as small_k400_16x8."""
    return {name.split("_")[1]: (f"hf:Sense-X/uniformer_video/uniformer_{name}.pth",) for name in names}


@family(
    "uniformer",
    name="uniformer_video",
    variants={  # frames x stride; without a stride the frames are spread over the whole clip (Something-Something)
        "pico": dict(**PICO, frames=8),
        "small": dict(**SMALL, frames=16, stride=4),  # 21.4 M, 80.8 % top-1 on Kinetics-400 with 4 clips
        "small_8x8": dict(**SMALL, frames=8, stride=8),
        "small_16x8": dict(**SMALL, frames=16, stride=8),
        "small_32x4": dict(**SMALL, frames=32, stride=4),
        "small_16": dict(**SMALL, frames=16),
        "small_32": dict(**SMALL, frames=32),
        "base": dict(**BASE, frames=16, stride=4),
        "base_8x8": dict(**BASE, frames=8, stride=8),
        "base_16x8": dict(**BASE, frames=16, stride=8),
        "base_32x4": dict(**BASE, frames=32, stride=4),  # 50 M, 82.9 % on Kinetics-400, 84.5 % on Kinetics-600
        "base_16": dict(**BASE, frames=16),
        "base_32": dict(**BASE, frames=32),  # 60.9 % and 71.2 % on Something-Something 1 and 2
    },
    official=OFFICIAL,
    weights={
        "small_16x8": _weights("small_k400_16x8", "small_k600_16x8"),
        "base_8x8": _weights("base_k400_8x8"),
        "base_16x8": _weights("base_k400_16x8", "base_k600_16x8"),
        "base_32x4": _weights("base_k600_32x4"),
    },
    mean=(0.45, 0.45, 0.45),
    std=(0.225, 0.225, 0.225),
    interpolation="bilinear",
)
class UniFormerVideo(VideoBackbone):
    """Video UniFormer classifier: clips (B, in_chans, T, H, W) -> logits (B, num_classes).

    H and W must be at least the stride of the last stage (32). The stem halves the number of frames, rounded up; rows and columns that a
    stride does not divide are dropped at the right and the bottom. Image checkpoints of the same width and depth load, with kernels
    inflated over time.

    Args:
        depths, dims: blocks and channels per stage.
        mixers: "L" (local) or "G" (global) for each stage.
        head_dim: channels per head.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels.
        patch_size: stride of the stem, pixels.
        attention: "joint" over time and space, or "divided": over time at each position, then over the positions of each frame.
        overlap: use kernels of three frames in the patch embeddings between stages (the authors' STD).
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the logits of the attention; None: head_dim ** -0.5.
        layer_scale: initial value of the layer scales; 0 for none.
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
        attention: str = "joint",
        overlap: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        check_stages(depths, dims, mixers, head_dim)
        if attention not in ("joint", "divided"):
            raise ValueError(f"attention must be 'joint' or 'divided', got {attention!r}")
        strides = [patch_size * 2**k for k in range(len(dims))]
        stages = [Stage(dim, stride, frame_stride=2) for dim, stride in zip(dims, strides, strict=True)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=strides[-1])
        common: dict[str, Any] = dict(mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop=drop_rate)
        global_block = GlobalBlock if attention == "joint" else DividedBlock
        heads: dict[str, Any] = dict(qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.stem = Patches(in_chans, dims[0], patch_size, axes=3, frames=3, frame_stride=2)
        self.stages = nn.ModuleList()
        for k, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [
                LocalBlock(dims[k], 3, **common, drop_path=rate)
                if mixers[k] == "L"
                else global_block(dims[k], 3, head_dim, **heads, **common, drop_path=rate)
                for rate in rates
            ]
            between = Patches(dims[k - 1], dims[k], 2, axes=3, frames=3 if overlap else 1) if k else nn.Identity()
            self.stages.append(PyramidStage(between, blocks))
        self.norm = nn.BatchNorm3d(dims[-1])
        init_weights(self, conv=False)
        for part in self.modules():
            if isinstance(part, DividedBlock):
                part.start_still()

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.stem(image.contiguous(memory_format=torch.channels_last_3d))
        x = F.dropout(x, self.drop_rate, self.training)
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x
