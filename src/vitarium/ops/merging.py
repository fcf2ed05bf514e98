"""Merging tokens: which become one, the merge itself, and its way back. Pure functions on tensors.

    merge = bipartite_matching(keys, remove=16, prefix=1)     # Merge: who stays, who goes into whom
    x, size = merge.average(x, size)                          # (B, N, C) -> (B, N - 16, C)
    x = merge.unmerge(x)                                      # back to (B, N, C), merged tokens equal

Source of the matching: Bolya et al., "Token Merging: Your ViT But Faster" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.ops.sorting import descending_order


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Chosen rows of each item: x (B, N, ...), index (B, n) -> (B, n, ...). Whole rows are copied at once."""
    batch, count = x.shape[:2]
    flat = index + count * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(batch * count, *x.shape[2:]).index_select(0, flat.reshape(-1)).view(*index.shape, *x.shape[2:])


@dataclass
class Merge:
    """A decision about N tokens of each item of a batch.

    Args:
        keep: (B, n) int64, the old index of each token that stays, in the new order.
        source: (B, r) int64, old indices of the tokens that go into another.
        target: (B, r) int64, new index of the token that each of them goes into.
    """

    keep: Tensor
    source: Tensor
    target: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """The tokens that stay, unchanged; the others are dropped. (B, N, ...) -> (B, n, ...)."""
        return rows(x, self.keep)

    def average(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Every new token is the mean of all that it stands for, weighted by how many originals each of them stood for.

        Args:
            x: (B, N, C).
            size: (B, N, 1), originals that each token stands for; None: one each.

        Returns:
            (B, n, C) and the new sizes (B, n, 1). Tokens that nothing is merged into stay as they are, bit by bit.
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
        """(B, N): the new index of the token that now stands for each old one."""
        batch, count = self.keep.shape
        new = torch.arange(count, device=self.keep.device).expand(batch, count)
        old = self.keep.new_empty(batch, count + self.source.shape[1])
        return old.scatter(1, self.keep, new).scatter(1, self.source, self.target)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, n, ...) -> (B, N, ...): each old token gets the value of the token that stands for it."""
        return rows(x, self.assignment())


def bipartite_matching(metric: Tensor, remove: int, *, prefix: int = 0) -> Merge | None:
    """Bipartite soft matching: tokens at even and odd places; the `remove` most similar pairs are merged.

    Args:
        metric: (B, N, D), what similarity (cosine) is measured on; no gradient flows through the decision.
        remove: tokens to remove; at most half of the image tokens can be, more is cut to that.
        prefix: tokens at the start that never merge (class, distillation, registers).

    Returns:
        prefix first, then the unmerged tokens of the even places, then all of the odd places; None where nothing is removed.
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
        source, rest = order[:, :remove], order[:, remove:].sort(dim=-1).values
        batch, count = metric.shape[0], prefix + image - remove
        keep = torch.cat(
            (torch.arange(prefix, device=metric.device).expand(batch, -1), place_a[rest], place_b.expand(batch, -1)),
            dim=1,
        )
        return Merge(keep, place_a[source], partner.gather(1, source) + (count - place_b.shape[0]))
