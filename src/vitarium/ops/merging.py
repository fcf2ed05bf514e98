"""Token merging: matching, the merge, and its inverse. Pure functions on tensors.

    merge = bipartite_matching(keys, remove=16, prefix=1)     # Merge: kept tokens, sources, targets
    x, size = merge.average(x, size)                          # (B, N, C) -> (B, N - 16, C)
    x = merge.unmerge(x)                                      # (B, N, C) again, merged tokens equal

Source of the matching: Bolya et al., "Token Merging: Your ViT But Faster" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.ops.sorting import descending_order


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of each item: x (B, N, ...), index (B, n) -> (B, n, ...). Whole rows are copied at once."""
    batch, count = x.shape[:2]
    flat = index + count * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(batch * count, *x.shape[2:]).index_select(0, flat.reshape(-1)).view(*index.shape, *x.shape[2:])


@dataclass
class Merge:
    """Assignment of the N tokens of each item of a batch to n merged tokens.

    Args:
        keep: (B, n) int64, old index of each token that is kept, in the new order.
        source: (B, r) int64, old indices of the tokens that merge into another.
        target: (B, r) int64, new index of the token into which each of them merges.
    """

    keep: Tensor
    source: Tensor
    target: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Return the kept tokens, unchanged; the others are dropped. (B, N, ...) -> (B, n, ...)."""
        return rows(x, self.keep)

    def average(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the merged tokens, each the mean of the tokens that it represents, weighted by their sizes.

        Args:
            x: (B, N, C).
            size: (B, N, 1), number of originals that each token represents; None: one each.

        Returns:
            (B, n, C) and the new sizes (B, n, 1). A token into which nothing merges is unchanged, bit by bit.
        """
        batch, count = self.keep.shape
        kept = rows(x, self.keep)
        flat = (self.target + count * torch.arange(batch, device=x.device)[:, None]).reshape(-1)
        if size is None:
            moved_size = x.new_ones(*self.source.shape, 1)
            new_size = x.new_ones(batch * count, 1).index_add(0, flat, moved_size.view(-1, 1)).view(batch, count, 1)
        else:
            moved_size = rows(size, self.source)
            new_size = rows(size, self.keep).view(-1, 1).index_add(0, flat, moved_size.view(-1, 1)).view(batch, count, 1)
        # sum_i size_i x_i / sum_i size_i  =  x_target + sum_source size_source (x_source - x_target) / new size
        change = (rows(x, self.source) - rows(kept, self.target)) * (moved_size / rows(new_size, self.target))
        kept.view(batch * count, -1).index_add_(0, flat, change.flatten(0, 1))
        return kept, new_size

    def assignment(self) -> Tensor:
        """Return the new index of the token that represents each old one, (B, N)."""
        batch, count = self.keep.shape
        new = torch.arange(count, device=self.keep.device).expand(batch, count)
        old = self.keep.new_empty(batch, count + self.source.shape[1])
        return old.scatter(1, self.keep, new).scatter(1, self.source, self.target)

    def unmerge(self, x: Tensor) -> Tensor:
        """Give each old token the value of the token that represents it: (B, n, ...) -> (B, N, ...)."""
        return rows(x, self.assignment())


def bipartite_matching(metric: Tensor, remove: int, *, prefix: int = 0) -> Merge | None:
    """Bipartite soft matching: tokens at even and odd places; the `remove` most similar pairs are merged.

    Args:
        metric: (B, N, D), compared by cosine similarity; no gradient flows through the matching.
        remove: tokens to remove; at most half of the image tokens.
        prefix: tokens at the start that never merge (class, distillation, registers).

    Returns:
        prefix first, then the unmerged tokens of the even places, then all of the odd places; None if nothing is removed. Behind a prefix
        the unmerged tokens keep their order; without one they are ordered by falling similarity to their partners, as in the authors'
        code, which sorts only to bring the class token to the front. The order decides the pairs of the next block.
    """
    image = metric.shape[1] - prefix
    remove = min(remove, image // 2)
    if remove <= 0:
        return None
    with torch.no_grad():
        metric = F.normalize(metric.detach()[:, prefix:], dim=-1, eps=1e-20)
        even = prefix % 2  # places are counted with the prefix, as the authors do: behind one class token, image token 0 is at an odd place
        a, b = metric[:, even::2], metric[:, 1 - even :: 2]
        place = torch.arange(prefix, prefix + image, device=metric.device)
        place_a, place_b = place[even::2], place[1 - even :: 2]
        best, partner = (a @ b.transpose(1, 2)).max(dim=-1)
        order = descending_order(best)
        source, rest = order[:, :remove], order[:, remove:]
        if prefix:
            rest = rest.sort(dim=-1).values
        batch, count = metric.shape[0], prefix + image - remove
        keep = torch.cat(
            (torch.arange(prefix, device=metric.device).expand(batch, -1), place_a[rest], place_b.expand(batch, -1)),
            dim=1,
        )
        return Merge(keep, place_a[source], partner.gather(1, source) + (count - place_b.shape[0]))
