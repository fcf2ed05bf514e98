"""Stages of a pyramid backbone and their downsampling layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from torch import Tensor, nn

from vitarium.nn.layers import LayerNorm2d

Value = TypeVar("Value", int, float, str, bool)


def per_stage(value: Value | Sequence[Value], count: int, name: str) -> list[Value]:
    """Return one value per stage (or axis), given one for all or a list of them.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} needs one value, or {count} values, got {value}")
    return list(value)


class PyramidStage(nn.Module):
    """Downsampling layer, blocks and an optional norm: (B, C_in, H, W) -> (B, C, H', W').

    Args:
        downsample: downsampling layer; may be the identity in the first stage, after a stem.
        blocks: modules that map a map to a map of the same shape.
        norm: applied to the output of the stage.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Run the stage; `run` is `Backbone.run_blocks`, which applies gradient checkpointing."""
        x = run(self.blocks, self.downsample(x))
        return x if self.norm is None else self.norm(x)


def conv_patches(in_dim: int, dim: int, size: int, *, norm: Literal["before", "after"]) -> nn.Sequential:
    """Return a strided convolution over disjoint patches with a layer norm before or after it.

    (B, in_dim, H, W) -> (B, dim, H // size, W // size).
    """
    conv = nn.Conv2d(in_dim, dim, size, size)
    if norm == "before":
        return nn.Sequential(OrderedDict(norm=LayerNorm2d(in_dim, eps=1e-6), conv=conv))
    return nn.Sequential(OrderedDict(conv=conv, norm=LayerNorm2d(dim, eps=1e-6)))
