"""A stage of a pyramid: a coarser map, equal blocks on it, and perhaps a norm at the end; and what makes a map coarser."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn

from vitarium.nn.layers import LayerNorm2d


class PyramidStage(nn.Module):
    """(B, C_in, H, W) -> (B, C, H', W').

    Args:
        downsample: what makes the map coarser; the first stage's may be identity where the stem did it.
        blocks: map -> map.
        norm: on the map that the stage gives out.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """`run` is the backbone's `run_blocks`, which checkpoints where that was asked for."""
        x = run(self.blocks, self.downsample(x))
        return x if self.norm is None else self.norm(x)


def conv_patches(in_dim: int, dim: int, size: int, *, norm: Literal["before", "after"]) -> nn.Sequential:
    """A convolution of stride `size` with a layer norm before or after it: (B, in_dim, H, W) -> (B, dim, H // size, W // size)."""
    conv = nn.Conv2d(in_dim, dim, size, size)
    if norm == "before":
        return nn.Sequential(OrderedDict(norm=LayerNorm2d(in_dim, eps=1e-6), conv=conv))
    return nn.Sequential(OrderedDict(conv=conv, norm=LayerNorm2d(dim, eps=1e-6)))
