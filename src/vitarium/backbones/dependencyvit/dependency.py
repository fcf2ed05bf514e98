"""Dependency masks of a forward pass and the tree that they define.

Legend: as in the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vitarium.backbones.dependencyvit.blocks import over_channels
from vitarium.ops.token_tree import TokenTree, grow_tree

Grid = tuple[int, int]


@dataclass(frozen=True)
class Dependency:
    """Messages between tokens in each layer.

    Args:
        masks: dependency mask of each layer, (B, n, n) as [parent, child], over the remaining tokens; columns sum to m.
        places: patch indices of these tokens for each layer, (B, n) int64.
        messages: (B, N) m of each token in the last layer before it was pruned.
        grid, patch_size, size: rows and columns of patches, side of a patch in pixels, height and width of the image in pixels.
    """

    masks: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    messages: Tensor
    grid: Grid
    patch_size: int
    size: tuple[int, int]

    def mean_mask(self, layers: Sequence[int] | None = None) -> Tensor:
        """Return the mean mask over layers, (B, N, N); pruned tokens send nothing.

        Args:
            layers: indices from 0, negative ones count from the end; None: all layers.

        Raises:
            ValueError: no layer, or an index out of range.
        """
        depth = len(self.masks)
        chosen = list(range(depth)) if layers is None else list(layers)
        if not chosen or any(not -depth <= i < depth for i in chosen):
            raise ValueError(f"layers must be one or more indices from {-depth} to {depth - 1}, got {list(chosen)}")
        batch, count = self.messages.shape
        total = self.masks[0].new_zeros(batch, count, count)
        for mask, place in ((self.masks[i], self.places[i]) for i in chosen):
            wide = mask.new_zeros(batch, count, mask.shape[2]).scatter(1, over_channels(place, mask), mask)
            total = total.scatter_add(2, place[:, None].expand(-1, count, -1), wide)
        return total / len(chosen)


def build_tree(dependency: Dependency, index: int = 0, layers: Sequence[int] | None = None) -> TokenTree:
    """Build the dependency tree of one image (see `vitarium.ops.token_tree`).

    Args:
        dependency: from `model(image, return_dependency=True)`.
        index: index of the image in the batch.
        layers: as for `Dependency.mean_mask`.
    """
    mask = dependency.mean_mask(layers)[index].detach().double().cpu().numpy()
    return grow_tree(mask, dependency.grid, dependency.patch_size, dependency.size)
