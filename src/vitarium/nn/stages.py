"""A stage of a pyramid: a coarser map, equal blocks on it, and perhaps a norm at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


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
