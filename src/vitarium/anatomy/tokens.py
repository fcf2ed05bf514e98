"""The state that travels with a sequence of tokens through the blocks of a model, one for all token reductions.

Blocks of foreign models hand each other nothing but a tensor. The state rides on that tensor as an attribute, so that it belongs to one
pass alone: passes in several threads, or one inside another, never meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitarium.errors import AttachError
from vitarium.ops.merging import Merge, rows

_ATTRIBUTE = "vitarium_tokens"


@dataclass
class Tokens:
    """Tokens on their way, and what became of the original ones.

    Args:
        x: (B, N, C) the tokens now.
        prefix: class, distillation and register tokens at the start; reductions leave them alone.
        originals: number of tokens at the start, prefix and image.
        size: (B, N, 1) how many originals each token stands for; None while it is one each.
        place: (B, N) at which original's place each token stands (for rotary positions); -1 for one that stands nowhere (a fused token).
            None while nothing moved.
        source: (B, originals) which token stands for each original now, -1 if it was dropped; None while each stands for itself.
        mask: (B, N) bool, True for real tokens where images keep different numbers of them; None: all are real.
    """

    x: Tensor
    prefix: int
    originals: int
    size: Tensor | None = None
    place: Tensor | None = None
    source: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def begin(cls, x: Tensor, prefix: int) -> Tokens:
        """The state before the first block."""
        return cls(x, prefix, x.shape[1])

    @property
    def count(self) -> int:
        """Tokens now, N."""
        return self.x.shape[1]

    @property
    def moved(self) -> bool:
        """Whether any reduction took place."""
        return self.source is not None

    def move(self, x: Tensor, keep: Tensor, assignment: Tensor, size: Tensor | None = None) -> None:
        """Go on with other tokens, and keep the books.

        Args:
            x: (B, n, C) the new tokens.
            keep: (B, n) old index of the token at whose place each new one stands, -1 for none.
            assignment: (B, N) new index of the token that stands for each old one, -1 for dropped ones.
            size: (B, n, 1) the new sizes, None: unchanged meaning (one each).
        """
        self.x, self.size = x, size
        old_place = keep if self.place is None else self.place.gather(1, keep.clamp(min=0))
        self.place = torch.where(keep < 0, -1, old_place)
        if self.source is None:
            self.source = assignment
        else:
            self.source = torch.where(self.source < 0, -1, assignment.gather(1, self.source.clamp(min=0)))

    def merge(self, merge: Merge) -> None:
        """Merge by size-weighted averages."""
        x, size = merge.average(self.x, self.size)
        self.move(x, merge.keep, merge.assignment(), size)

    def restore(self) -> Tensor:
        """(B, originals, C): every original gets the value of the token that stands for it, zeros where it was dropped.

        A mean over the result is the size-weighted mean of the merged tokens, and attention pooling over it is proportional attention.
        """
        if self.source is None:
            return self.x
        return rows(self.x, self.source.clamp(min=0)) * (self.source >= 0)[..., None].to(self.x.dtype)

    def bias(self, *, proportional: bool) -> Tensor | None:
        """What is added to the attention logits, (B, 1, 1, N): the logarithm of the sizes, and -inf where nothing is. None for nothing."""
        bias = self.size.log().transpose(1, 2)[:, None] if proportional and self.size is not None else None
        if self.mask is not None:
            hidden = torch.zeros_like(self.mask, dtype=self.x.dtype).masked_fill(~self.mask, -torch.inf)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        return bias

    def rope(self, table: Tensor) -> Tensor:
        """Each image token's own row of a rotary table: ([H,] originals - prefix, D) -> (B, 1 or H, N - prefix, D)."""
        if self.place is None:
            return table
        if table.ndim > 3:
            raise AttachError("a rotary table that differs from image to image (patch dropout) does not go together with token reduction")
        index = self.place[:, self.prefix :] - self.prefix
        return table[index][:, None] if table.ndim == 2 else table[:, index].transpose(0, 1)


def carried(x: Tensor) -> Tokens | None:
    """The state that rides on a tensor of tokens that a wrapped block gave out (its `x` is left empty); None for any other tensor."""
    return getattr(x, _ATTRIBUTE, None)


def carry(tokens: Tokens) -> Tensor:
    """The tokens as a tensor with their state on it."""
    x = tokens.x
    tokens.x = x.new_empty(0)  # a tensor that holds itself would live until the garbage collector comes round
    setattr(x, _ATTRIBUTE, tokens)
    return x
