"""Structural re-parameterisation: parallel convolutions in training, a single convolution in inference (RepVGG, MobileOne).

    y = sum_i BN_i(W_i x) + BN_0(x)  =  W x + b

A small kernel is padded with zeros to a larger one, a grouped kernel is a block-diagonal dense one, a batch norm with fixed statistics is
affine, and a sum of convolutions is a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.convolutions import ConvNorm
from vitarium.nn.folding import fold_norm_after


class RepConv(nn.Module):
    """Parallel convolutions with batch norms, a single one after `fold`: (B, in_dim, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride)).

    If the shape is unchanged, there is an additional branch with only a batch norm.

    Args:
        in_dim, dim: channels before and after.
        branches: kernel size and groups of each convolution.
        stride: of all branches.
        dilation: of the branches with kernels larger than 1.

    Raises:
        ValueError: an even kernel, or channels that are not divisible by the groups.
    """

    def __init__(self, in_dim: int, dim: int, branches: Sequence[tuple[int, int]], *, stride: int = 1, dilation: int = 1):
        for kernel, groups in branches:
            if kernel % 2 == 0:
                raise ValueError(f"parallel kernels share their centre: sizes must be odd, got {kernel}")
            if in_dim % groups or dim % groups:
                raise ValueError(f"{in_dim} -> {dim} channels do not divide into {groups} groups")
        super().__init__()
        self.branches = nn.ModuleList(ConvNorm(in_dim, dim, k, stride, dilation=dilation if k > 1 else 1, groups=g) for k, g in branches)
        self.identity = nn.BatchNorm2d(dim) if in_dim == dim and stride == 1 else None
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.conv(x)
        y = x.new_zeros(()) if self.identity is None else self.identity(x)
        for branch in self.branches:
            y = y + branch(x)
        return y

    @torch.no_grad()
    def fold(self) -> None:
        """Merge all branches into the convolution `conv`. A second call does nothing."""
        if self.conv is not None:
            return
        for branch in self.branches:
            branch.fold()  # type: ignore[operator]
        folded: list[Any] = [branch.conv for branch in self.branches]
        largest: Any = max(folded, key=lambda conv: conv.kernel_size[0])  # gives stride and padding of the merged convolution
        groups = math.gcd(*(conv.groups for conv in folded))
        if self.identity is not None:
            unit = nn.Conv2d(largest.in_channels, largest.out_channels, 1, groups=largest.out_channels, bias=False).to(largest.weight)
            nn.init.ones_(unit.weight)
            folded.append(fold_norm_after(unit, self.identity))
        whole = nn.Conv2d(
            largest.in_channels, largest.out_channels, largest.kernel_size, largest.stride, largest.padding, largest.dilation, groups
        ).to(largest.weight)
        whole.weight.copy_(torch.stack([_widened(conv, groups, largest.kernel_size[0]) for conv in folded]).sum(0))
        whole.bias.copy_(torch.stack([conv.bias for conv in folded]).sum(0))
        self.conv, self.branches, self.identity = whole, nn.ModuleList(), None


def _widened(conv: nn.Conv2d, groups: int, kernel: int) -> Tensor:
    """Return the weight of the same convolution with fewer groups (block-diagonal) and a larger kernel (padded with zeros)."""
    out, per_group, side, _ = conv.weight.shape
    inner = conv.groups // groups  # groups of the convolution in each of the new ones
    weight = conv.weight.new_zeros(groups, inner, out // conv.groups, inner, per_group, side, side)
    for i in range(inner):
        weight[:, i, :, i] = conv.weight.view(groups, inner, out // conv.groups, per_group, side, side)[:, i]
    around = (kernel - side) // 2
    return F.pad(weight.view(out, inner * per_group, side, side), [around] * 4)


def rep_conv(in_dim: int, dim: int, kernel_size: int, *, stride: int = 1, groups: int = 1, dilation: int = 1) -> RepConv:
    """Return a `RepConv` with the usual branches: K x K and 1 x 1, or two 1 x 1 if K is 1."""
    return RepConv(in_dim, dim, [(kernel_size, groups), (1, groups)], stride=stride, dilation=dilation)
