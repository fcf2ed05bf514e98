"""Folding of batch norms into adjacent convolutions for inference.

    model.eval().fuse()

A batch norm with fixed statistics is affine. A module with such norms defines `fold()`, which folds them in place and leaves its outputs in
evaluation mode unchanged; `Backbone.fuse` calls `fold()` on every module. A folded model cannot be trained further or saved with
`vitarium.save`: keep the original.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def _affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (C,) each, such that the norm computes scale x + shift."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return scale, shift


@torch.no_grad()
def fold_norm_after(conv: nn.Conv2d, norm: BatchNorm) -> nn.Conv2d:
    """Return the convolution that computes norm(conv(x)), for any kernel, padding and groups."""
    scale, shift = _affine(norm)
    bias = conv.bias if conv.bias is not None else torch.zeros_like(shift)
    return _with(conv, conv.weight * scale[:, None, None, None], shift + scale * bias)


@torch.no_grad()
def fold_norm_before(norm: BatchNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution that computes conv(norm(x)).

    Raises:
        ValueError: the convolution has padding, whose zeros the norm does not shift, or groups.
    """
    if conv.padding not in (0, (0, 0), "valid") or conv.groups != 1:
        raise ValueError("a norm can be folded into a following convolution only if that has no padding and no groups")
    scale, shift = _affine(norm)
    bias = conv.bias if conv.bias is not None else 0
    return _with(conv, conv.weight * scale[:, None, None], torch.einsum("oihw,i->o", conv.weight, shift) + bias)


def fold_pair(module: nn.Module, conv: str, norm: str) -> None:
    """Fold the batch norm `module.norm` into the convolution `module.conv` before it, in place; the norm becomes the identity.

    Nothing happens where the norm is no batch norm, for example after an earlier fold, or the convolution is not two-dimensional.

    Args:
        conv, norm: names of the two submodules.
    """
    first, second = getattr(module, conv), getattr(module, norm)
    if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
        setattr(module, conv, fold_norm_after(first, second))
        setattr(module, norm, nn.Identity())


def _with(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a copy of a convolution with another weight and bias."""
    new = copy.deepcopy(conv)
    new.weight, new.bias = nn.Parameter(weight), nn.Parameter(bias)
    return new
