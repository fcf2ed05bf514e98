"""Random masking of a sequence's tokens, and restoring their order, for masked autoencoders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """A mask for each sequence of a batch; L is the length of a sequence.

    Attributes:
        kept: indices of the visible tokens, in the order in which they are taken, int64 (B, K).
        restore: for each position, the index of its token in [visible tokens, hidden tokens], int64 (B, L).
        hidden: 1 at hidden positions, 0 at visible ones, float32 (B, L).
    """

    kept: Tensor
    restore: Tensor
    hidden: Tensor


def visible_count(count: int, mask_ratio: float) -> int:
    """Return the number of visible tokens out of `count`, rounded down as in MAE (196 tokens at 0.9: 19)."""
    return int(count * (1 - mask_ratio))


def mask_by_noise(noise: Tensor, keep: int) -> Masking:
    """Keep the `keep` positions with the smallest noise visible, in ascending order of noise: (B, L) -> Masking.

    With uniform noise every choice is equally likely.
    """
    order = noise.argsort(1)
    restore = order.argsort(1)
    return Masking(order[:, :keep], restore, (restore >= keep).float())


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Gather tokens (B, L, C) at indices (B, K): (B, K, C)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def restore_tokens(visible: Tensor, filler: Tensor, restore: Tensor) -> Tensor:
    """Put visible tokens (B, K, C) at their positions and `filler` (1, 1, C) at all others: (B, L, C)."""
    batch, keep, dim = visible.shape
    hidden = filler.to(visible.dtype).expand(batch, restore.shape[1] - keep, dim)
    return take_tokens(torch.cat([visible, hidden], 1), restore)
