"""State of a token sequence as it passes through the blocks of a model, shared by all token reductions.

Blocks of other libraries' models pass only a tensor to each other. The state is an attribute of that tensor, so that it belongs to one
forward pass: concurrent and nested passes do not interfere.

Images of different token counts in one batch have a mask. A reduction gets only real tokens (`packed`): images of equal count are reduced
together, and the results are padded again, so that the output for an image does not depend on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.errors import AttachError, InputError
from vitarium.ops.merging import Merge, rows

_ATTRIBUTE = "vitarium_tokens"


@dataclass
class Tokens:
    """Tokens after some blocks, and the mapping from the original tokens to them.

    Args:
        x: (B, N, C) the current tokens.
        prefix: number of class, distillation and register tokens at the start; reductions do not change them.
        originals: number of tokens before the first block, prefix and image.
        size: (B, N, 1) number of originals that each token represents, 0 for padding; None: one each.
        place: (B, N) index of the original token whose position each token has (for rotary embedding); -1 for none (a fused token,
            padding).
            None: no token was moved.
        source: (B, originals) index of the token that represents each original, -1 if it was dropped or is padding; None: identity.
        mask: (B, N) bool, True for real tokens where images have different numbers of them; None: all are real.
    """

    x: Tensor
    prefix: int
    originals: int
    size: Tensor | None = None
    place: Tensor | None = None
    source: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def begin(cls, x: Tensor, prefix: int, mask: Tensor | None = None) -> Tokens:
        """Return the state before the first block.

        Args:
            x: (B, N, C), prefix and image tokens.
            prefix: see `Tokens`.
            mask: bool, True for real tokens: (B, N), or (B, N - prefix) of the image tokens alone. True everywhere is the same as None.

        Raises:
            InputError: a mask of another shape or dtype, one that hides a prefix token, or an image without a real token.
        """
        return cls(x, prefix, x.shape[1], mask=None if mask is None else _checked(mask, x, prefix))

    @property
    def count(self) -> int:
        """Current number of tokens, N."""
        return self.x.shape[1]

    @property
    def counts(self) -> Tensor:
        """Current number of real tokens of each image, (B,)."""
        if self.mask is None:
            return torch.full(self.x.shape[:1], self.count, device=self.x.device)
        return self.mask.sum(1)

    @property
    def moved(self) -> bool:
        """Return whether a reduction has changed the tokens."""
        return self.source is not None

    def move(self, x: Tensor, keep: Tensor, assignment: Tensor, size: Tensor | None = None) -> None:
        """Replace the tokens, and update sizes, places and sources.

        Args:
            x: (B, n, C) the new tokens.
            keep: (B, n) old index of the token whose position each new one takes, -1 for none.
            assignment: (B, N) new index of the token that represents each old one, -1 for dropped ones.
            size: (B, n, 1) the new sizes, None: one each.
        """
        self.x, self.size = x, size
        old_place = keep if self.place is None else self.place.gather(1, keep.clamp(min=0))
        self.place = torch.where(keep < 0, -1, old_place)
        if self.source is None:
            self.source = assignment
        else:
            self.source = torch.where(self.source < 0, -1, assignment.gather(1, self.source.clamp(min=0)))

    def merge(self, merge: Merge) -> None:
        """Replace merged tokens by their size-weighted averages."""
        x, size = merge.average(self.x, self.size)
        self.move(x, merge.keep, merge.assignment(), size)

    def restore(self) -> Tensor:
        """Return (B, originals, C): each original with the value of the token that represents it, zeros if it was dropped or is padding.

        Without padding, a mean over the result is the size-weighted mean of the merged tokens, and attention pooling over it is
        proportional attention.
        """
        if self.source is None:
            return self.x
        return rows(self.x, self.source.clamp(min=0)) * (self.source >= 0)[..., None].to(self.x.dtype)

    def bias(self, *, proportional: bool) -> Tensor | None:
        """Return the attention bias (B, 1, 1, N): the logarithm of the sizes if `proportional`, -inf at padding; None if it is zero."""
        bias = self.size.log().transpose(1, 2)[:, None] if proportional and self.size is not None else None
        if self.mask is not None:
            hidden = torch.zeros_like(self.mask, dtype=self.x.dtype).masked_fill(~self.mask, -torch.inf)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        return bias

    def mean(self, *, weighted: bool = True) -> Tensor:
        """Return the mean of the real image tokens, (B, C); of all tokens if there are no image tokens left.

        Args:
            weighted: count a merged token once for each original that it represents.
        """
        start = self.prefix if self.count > self.prefix else 0
        weights = torch.ones_like(self.x[..., :1]) if self.size is None or not weighted else self.size.to(self.x.dtype)
        weights = weights if self.mask is None else weights * self.mask[..., None]
        return (self.x * weights)[:, start:].sum(1) / weights[:, start:].sum(1)

    def packed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield groups of images with equal counts of real tokens: image numbers (b,), and the tokens' indices (b, n), ascending."""
        if self.mask is None:
            everything = torch.arange(self.count, device=self.x.device).expand(len(self.x), -1)
            yield torch.arange(len(self.x), device=self.x.device), everything
            return
        counts = self.counts
        for count in counts.unique().tolist():
            images = (counts == count).nonzero()[:, 0]
            yield images, self.mask[images].nonzero()[:, 1].view(len(images), count)

    def reduce_packed(self, reduce: Callable[[Tokens, Tensor, Tensor], None]) -> None:
        """Reduce images of different token counts: each group of equal counts on its real tokens alone, then pad the results.

        Args:
            reduce: called with a group's tokens (without a mask), image numbers (b,) and token indices (b, n); may change the tokens.
        """
        groups = []
        for images, index in self.packed():
            part = Tokens(rows(self.x[images], index), self.prefix, index.shape[1])
            part.size = None if self.size is None else rows(self.size[images], index)
            reduce(part, images, index)
            groups.append((images, index, part))
        if not any(part.moved for _, _, part in groups):
            return
        batch, count = len(self.x), max(part.count for _, _, part in groups)
        x = self.x.new_zeros(batch, count, self.x.shape[2])
        sized = any(part.size is not None for _, _, part in groups)
        size = self.x.new_zeros(batch, count, 1) if sized else None
        keep = torch.full((batch, count), -1, device=x.device)
        assignment = torch.full((batch, self.count), -1, device=x.device)
        mask = torch.zeros(batch, count, dtype=torch.bool, device=x.device)
        for images, index, part in groups:
            still = torch.arange(part.count, device=x.device).expand(len(images), -1)
            place = still if part.place is None else part.place
            source = still if part.source is None else part.source
            x = x.index_put((images[:, None], still), part.x)
            keep[images[:, None], still] = torch.where(place < 0, -1, index.gather(1, place.clamp(min=0)))
            assignment[images[:, None], index] = source
            mask[images, : part.count] = True
            if size is not None:
                one = torch.ones_like(part.x[..., :1])
                size[images[:, None], still] = one if part.size is None else part.size
        self.mask = None
        self.move(x, keep, assignment, size)
        self.mask = None if bool(mask.all()) else mask

    def rope(self, table: Tensor) -> Tensor:
        """Return each image token's row of a rotary table: ([H,] originals - prefix, D) -> (B, 1 or H, N - prefix, D)."""
        if self.place is None:
            return table
        if table.ndim > 3:
            raise AttachError("a rotary table that differs from image to image (patch dropout) does not go together with token reduction")
        index = self.place[:, self.prefix :] - self.prefix
        index = index if self.mask is None else index.clamp(min=0)  # padding has no position
        return table[index][:, None] if table.ndim == 2 else table[:, index].transpose(0, 1)


def carried(x: Tensor) -> Tokens | None:
    """Return the state attached to a tensor of tokens that a wrapped block returned (its `x` is empty); None for any other tensor."""
    return getattr(x, _ATTRIBUTE, None)


def carry(tokens: Tokens) -> Tensor:
    """Return the tokens as a tensor with their state attached."""
    x = tokens.x
    tokens.x = x.new_empty(0)  # a tensor that references itself would live until the next garbage collection
    setattr(x, _ATTRIBUTE, tokens)
    return x


def _checked(mask: Tensor, x: Tensor, prefix: int) -> Tensor | None:
    batch, count = x.shape[:2]
    if mask.dtype is not torch.bool or tuple(mask.shape) not in ((batch, count), (batch, count - prefix)):
        accepted = f"bool, ({batch}, {count}) or ({batch}, {count - prefix}) without the {prefix} tokens before the image's"
        raise InputError(f"the mask of these tokens is {accepted}; got {mask.dtype} {tuple(mask.shape)}")
    mask = mask.to(x.device)
    if mask.shape[1] != count:
        mask = torch.cat((mask.new_ones(batch, prefix), mask), 1)
    if not bool(mask[:, :prefix].all()):
        raise InputError(f"the mask hides one of the {prefix} class, distillation or register tokens, which every image has")
    if not bool(mask[:, prefix:].any(1).all()):
        image = int((~mask[:, prefix:].any(1)).nonzero()[0])
        raise InputError(f"the mask leaves image {image} of the batch no token")
    return None if bool(mask.all()) else mask
