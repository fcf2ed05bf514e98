"""Convolutions as they are deployed: the activation in the same kernel, and a large batch worked on a few images at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.folding import fold_norm_after
from vitarium.nn.layers import PIECE_BYTES
from vitarium.ops.convolution import conv2d
from vitarium.ops.linear import Gelu, in_plain_inference


class Conv2d(nn.Conv2d):
    """nn.Conv2d by the fastest kernel of the device (ops/convolution.py): (B, C_in, H, W) -> (B, C, H', W')."""

    def forward(self, x: Tensor, gelu: Gelu | None = None) -> Tensor:
        """With `gelu` the GELU of it, by the name of `F.gelu`'s form."""
        if self.padding_mode == "zeros" and isinstance(self.padding, tuple):
            where = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
            return conv2d(x, self.weight, self.bias, **cast(Any, where), gelu=gelu)
        out = super().forward(x)
        return F.gelu(out, approximate=gelu) if gelu else out


def conv_norm_gelu(x: Tensor, conv: nn.Module, norm: nn.Module | None = None, approximate: Gelu = "none") -> Tensor:
    """GELU(norm(conv(x))); in one kernel where there is no norm (any more) and nobody looks at or replaced the convolution."""
    no_norm = norm is None or (type(norm) is nn.Identity and not norm._forward_hooks)
    if no_norm and isinstance(conv, Conv2d) and not conv._forward_hooks:
        return conv(x, approximate)
    y = conv(x)
    return F.gelu(y if norm is None else norm(y), approximate=approximate)


class ConvNorm(nn.Module):
    """Convolution and batch norm, one convolution after `fold`: (B, C_in, H, W) -> (B, C, H', W').

    Args:
        in_dim, dim: channels before and after.
        kernel_size, stride, groups, bias: of the convolution.
        padding: pixels; None: half the kernel, so that H' = ceil(H / stride) where it is odd.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        around = kernel_size // 2 if padding is None else padding
        self.conv: nn.Conv2d = Conv2d(in_dim, dim, kernel_size, stride, around, groups=groups, bias=bias)
        self.bn: nn.Module = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def activated(self, x: Tensor) -> Tensor:
        """GELU of it."""
        return conv_norm_gelu(x, self.conv, self.bn)

    def fold(self) -> None:
        """The norm goes into the convolution."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fold_norm_after(self.conv, self.bn), nn.Identity()


def by_images(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, channels: int) -> Tensor:
    """forward(x), in inference on a CPU for so few images at a time that their inner maps stay in the cache.

    A whole batch's maps would be mapped anew from the system at each call, which costs more than the arithmetic on them.

    Args:
        module: whose `forward` it is; where one of its parts has hooks, these see the whole batch.
        forward: treats each image for itself; (B, C, H, W) -> (B, C', H', W').
        x: (B, C, H, W).
        channels: of the largest inner map, at x's height and width.
    """
    if torch.compiler.is_compiling() or module.training or x.device.type != "cpu" or not in_plain_inference(x, *module.parameters()):
        return forward(x)
    most = max(1, PIECE_BYTES // max(1, channels * x.shape[2] * x.shape[3] * x.element_size()))
    if len(x) <= most or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module):
        return forward(x)
    return torch.cat([forward(piece) for piece in x.split(most)])
