"""Hiding most of a sequence's tokens, and putting the rest back in its places."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Which tokens of a batch of sequences of length L stay visible.

    Attributes:
        kept: places of the visible tokens in the order in which they come out, int64 (B, K).
        restore: for each place, where its token stands among [visible tokens, hidden tokens], int64 (B, L).
        hidden: 1 at hidden places, 0 at visible ones, float32 (B, L).
    """

    kept: Tensor
    restore: Tensor
    hidden: Tensor


def visible_count(count: int, mask_ratio: float) -> int:
    """How many of `count` tokens stay visible; rounded down, as MAE does (196 tokens at 0.9: 19)."""
    return int(count * (1 - mask_ratio))


def mask_by_noise(noise: Tensor, keep: int) -> Masking:
    """The `keep` places of least noise stay visible, those of the least first: (B, L) -> Masking. Uniform noise makes every choice equally
    likely."""
    order = noise.argsort(1)
    restore = order.argsort(1)
    return Masking(order[:, :keep], restore, (restore >= keep).float())


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, L, C) at places (B, K) -> (B, K, C)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def restore_tokens(visible: Tensor, filler: Tensor, restore: Tensor) -> Tensor:
    """Visible tokens (B, K, C) in their places, `filler` (1, 1, C) in all others -> (B, L, C)."""
    batch, keep, dim = visible.shape
    hidden = filler.to(visible.dtype).expand(batch, restore.shape[1] - keep, dim)
    return take_tokens(torch.cat([visible, hidden], 1), restore)
