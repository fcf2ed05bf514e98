"""Who depended on whom in one pass, and the tree of it.

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
    """Who sent how much to whom, in each layer.

    Args:
        masks: for each layer (B, n, n), [parent, child], over the tokens that were there; columns sum to m.
        places: for each layer (B, n) int64, the patches that these tokens are.
        messages: (B, N) m of the last layer that each token was in.
        grid, patch_size, size: h and w, side of a patch, height and width of the image in pixels.
    """

    masks: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    messages: Tensor
    grid: Grid
    patch_size: int
    size: tuple[int, int]

    def mean_mask(self, layers: Sequence[int] | None = None) -> Tensor:
        """(B, N, N): the mean over layers (numbered from 0, negative from the end; None: all). Who has left sends nothing.

        Raises:
            ValueError: no layer, or one that is not there.
        """
        depth = len(self.masks)
        chosen = list(range(depth)) if layers is None else list(layers)
        if not chosen or any(not -depth <= i < depth for i in chosen):
            raise ValueError(f"layers are numbers from 0 to {depth - 1} (negative from the end), at least one; got {list(chosen)}")
        batch, count = self.messages.shape
        total = self.masks[0].new_zeros(batch, count, count)
        for mask, place in ((self.masks[i], self.places[i]) for i in chosen):
            wide = mask.new_zeros(batch, count, mask.shape[2]).scatter(1, over_channels(place, mask), mask)
            total = total.scatter_add(2, place[:, None].expand(-1, count, -1), wide)
        return total / len(chosen)


def build_tree(dependency: Dependency, index: int = 0, layers: Sequence[int] | None = None) -> TokenTree:
    """The dependency tree of one image: parts, saliency, picture (see `vitarium.ops.token_tree`).

    Args:
        dependency: from `model(image, return_dependency=True)`.
        index: which image of the batch.
        layers: as for `Dependency.mean_mask`.
    """
    mask = dependency.mean_mask(layers)[index].detach().double().cpu().numpy()
    return grow_tree(mask, dependency.grid, dependency.patch_size, dependency.size)
