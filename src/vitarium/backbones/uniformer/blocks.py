"""Modules of UniFormer for images and clips: local and global blocks, patch embeddings, checkpoint names.

Legend: B batch, C channels, S the axes of a map (H, W or T, H, W).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitarium.catalog import chain, part_of, rename
from vitarium.nn import Attention, DropPath, LayerNorm2d, LayerNorm3d, Linear, Mlp, layer_scale_gamma
from vitarium.ops.windows import pad_to_multiple, window_partition, window_reverse

CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAYER_NORM: dict[int, type[nn.Module]] = {2: LayerNorm2d, 3: LayerNorm3d}


def channels_last(x: Tensor) -> Tensor:
    """Move the channels to the last axis: (B, C, S) -> (B, S, C), a view."""
    return x.movedim(1, -1)


def channels_first(x: Tensor) -> Tensor:
    """Move the channels to the second axis: (B, S, C) -> (B, C, S), a view."""
    return x.movedim(-1, 1)


def gamma(dim: int, layer_scale: float) -> nn.Parameter | None:
    """Return a layer scale parameter, or None if its initial value is 0."""
    return layer_scale_gamma(dim, layer_scale)


class Block(nn.Module):
    """Base of local and global blocks: (B, C, S) -> the same shape, channels-last in memory.

    Args:
        dim: channels C.
        axes: 2 for images, 3 for clips.
        norm: norm of the first branch; the second has a new one of the same class.
        mlp_ratio: ratio of the MLP's hidden channels to C.
        layer_scale: initial value of the two layer scales; 0 for none.
        drop, drop_path: dropout rate of projection and MLP, and stochastic depth rate.
    """

    def __init__(self, dim: int, axes: int, norm: nn.Module, mlp_ratio: float, layer_scale: float, drop: float, drop_path: float):
        super().__init__()
        self.pos_embed = CONV[axes](dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = norm, type(norm)(dim, eps=norm.eps)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), drop=drop)
        self.gamma_1, self.gamma_2 = gamma(dim, layer_scale), gamma(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor, factor: nn.Parameter | None) -> Tensor:
        """Apply layer scale and stochastic depth to a branch, (B, S, C)."""
        return self.drop_path(x if factor is None else x * factor)


class LocalBlock(Block):
    """Block with local affinity: a depth-wise convolution between two linear layers, without activation."""

    def __init__(self, dim: int, axes: int, **options: Any):
        super().__init__(dim, axes, BATCH_NORM[axes](dim), **options)
        self.conv1 = Linear(dim, dim)
        self.attn = CONV[axes](dim, dim, 5, padding=2, groups=dim)
        self.conv2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        y = self.attn(channels_first(self.conv1(channels_last(self.norm1(x)))))
        x = x + channels_first(self.branch(self.conv2(channels_last(y)), self.gamma_1))
        return x + channels_first(self.branch(self.mlp(channels_last(self.norm2(x))), self.gamma_2))


class GlobalBlock(Block):
    """Block with global affinity: self-attention over all tokens of the map, or with `window_size` (images only) inside windows."""

    attention_class = Attention

    def __init__(
        self,
        dim: int,
        axes: int,
        head_dim: int,
        *,
        window_size: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        **options: Any,
    ):
        super().__init__(dim, axes, nn.LayerNorm(dim, eps=1e-6), **options)
        self.attn = self.attention_class(dim, dim // head_dim, qkv_bias=qkv_bias, scale=qk_scale, proj_drop=options["drop"])
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x + self.pos_embed(x))
        x = x + self.branch(self.attend(self.norm1(x)), self.gamma_1)
        x = x + self.branch(self.mlp(self.norm2(x)), self.gamma_2)
        return channels_first(x)

    def attend(self, x: Tensor) -> Tensor:
        """Apply self-attention: (B, S, C) -> the same shape."""
        if self.window_size is None:
            return self.attn(x.flatten(1, -2)).view(x.shape)
        height, width = x.shape[1:3]
        x = pad_to_multiple(x, self.window_size)
        y = self.attn(window_partition(x, self.window_size))
        return window_reverse(y, self.window_size, *x.shape[1:3])[:, :height, :width]


class DividedBlock(GlobalBlock):
    """Block with divided attention: over time at each position, then over the positions of each frame.

    The residual connection of the second attention starts at the input of the first.
    """

    def __init__(self, dim: int, axes: int, head_dim: int, **options: Any):
        super().__init__(dim, axes, head_dim, **options)
        self.t_norm = nn.LayerNorm(dim, eps=1e-6)
        attention: dict[str, Any] = dict(qkv_bias=self.attn.qkv.bias is not None, scale=self.attn.scale)
        self.t_attn = Attention(dim, dim // head_dim, proj_drop=options["drop"], **attention)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x + self.pos_embed(x))
        batch, frames, height, width, dim = x.shape
        y = x.permute(0, 2, 3, 1, 4).reshape(-1, frames, dim)
        y = y + self.drop_path(self.t_attn(self.t_norm(y)))
        y = y.view(batch, height * width, frames, dim).transpose(1, 2).reshape(-1, height * width, dim)
        x = x + self.branch(self.attn(self.norm1(y)), self.gamma_1).view(x.shape)
        return channels_first(x + self.branch(self.mlp(self.norm2(x)), self.gamma_2))

    def start_still(self) -> None:
        """Initialise the temporal attention to output zero, in place, with a projection of ones so that it gets gradients."""
        for value, parameters in ((0.0, (*self.t_attn.qkv.parameters(), self.t_attn.proj.bias)), (1.0, (self.t_attn.proj.weight,))):
            for parameter in parameters:
                nn.init.constant_(parameter, value)


class Patches(nn.Sequential):
    """Patch embedding by a convolution over disjoint patches and a layer norm: (B, C_in, S) -> (B, C, S'), the remainder dropped.

    For clips, the kernel spans `frames` frames with the stride `frame_stride` and zero padding of frames // 2.
    """

    def __init__(self, in_dim: int, dim: int, size: int, *, axes: int = 2, frames: int = 1, frame_stride: int = 1):
        time = axes - 2
        kernel, stride = (frames,) * time + (size, size), (frame_stride,) * time + (size, size)
        conv = CONV[axes](in_dim, dim, kernel, stride, (frames // 2,) * time + (0, 0))
        super().__init__(OrderedDict(proj=conv, norm=LAYER_NORM[axes](dim)))


class Convolutions(nn.Sequential):
    """Convolutions of side 3 and the given strides with batch norms, and GELUs between them: (B, C_in, S) -> (B, C, S'), rounded up.

    For clips (`axes` 3), the last convolution has the stride `frame_stride` over the frames.
    """

    def __init__(self, in_dim: int, dim: int, *strides: int, axes: int = 2, frame_stride: int = 1):
        dims = [in_dim, *(dim // 2 for _ in strides[1:]), dim]
        parts: list[nn.Module] = []
        for i, stride in enumerate(strides):
            time = (frame_stride if i == len(strides) - 1 else 1,) * (axes - 2)
            parts += [CONV[axes](dims[i], dims[i + 1], 3, (*time, stride, stride), 1), BATCH_NORM[axes](dims[i + 1]), nn.GELU()]
        super().__init__(OrderedDict(proj=nn.Sequential(*parts[:-1])))


def check_stages(depths: Sequence[int], dims: Sequence[int], mixers: str, head_dim: int) -> None:
    if not len(depths) == len(dims) == len(mixers):
        raise ValueError(f"depths, dims and mixers need one value per stage, got {depths}, {dims} and {mixers!r}")
    if set(mixers) - set("LG"):
        raise ValueError(f"mixers must be L (local) or G (global) for each stage, such as 'LLGG', got {mixers!r}")
    if wrong := [dim for dim, mixer in zip(dims, mixers, strict=True) if mixer == "G" and dim % head_dim]:
        raise ValueError(f"the channels of a global stage must be divisible by head_dim {head_dim}, got {wrong[0]}")


_CONV_LINEAR = re.compile(r"^blocks\d\.\d+\.(conv[12]|mlp\.fc[12])\.weight$")


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reshape the authors' 1 x 1 convolutions to linear layers, and layer scales to one axis."""
    flat = {}
    for name, tensor in state.items():
        if _CONV_LINEAR.search(name):
            tensor = tensor.flatten(1)
        elif ".gamma_" in name:
            tensor = tensor.flatten()
        flat[name] = tensor
    return flat


OFFICIAL = chain(
    part_of("backbone."),  # of a detector or segmenter
    _flat,
    rename(
        (r"^patch_embed1\.", "stem."),
        *((rf"^patch_embed{k + 1}\.", f"stages.{k}.downsample.") for k in (1, 2, 3)),
        *((rf"^blocks{k + 1}\.(\d+)\.", rf"stages.{k}.blocks.\1.") for k in range(4)),
        (r"^cls_upsample\.", "stages.3.cls_upsample."),
        (r"^norm([1-4])\.", r"norms.\1."),
    ),
    rename(*((rf"^norms\.{k + 1}\.(weight|bias)$", rf"norms.{k}.\1") for k in range(4))),
)
