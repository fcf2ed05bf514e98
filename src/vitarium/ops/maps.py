"""Conversion between feature maps and token sequences. Both directions share the memory of a channels-last map."""

from __future__ import annotations

from torch import Tensor


def as_tokens(x: Tensor) -> Tensor:
    """Flatten a map row by row: (B, C, H, W) -> (B, H W, C). A view if the map is channels-last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Arrange tokens on a grid of H rows and W columns: (B, H W, C) -> (B, C, H, W), a channels-last view."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)
