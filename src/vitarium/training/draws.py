"""Random numbers for single samples, independent of the number of processes, the accumulation and the other players.

    noise = learner.noise(batch, 64)      # (B, 64): row i depends on (seed, step, player, position of sample i in the whole batch, call)

The position of a sample counts over accumulated batches and processes, so that one process with a batch of 16, two processes with 8 each
and two accumulated batches of 8 draw the same numbers for the same sample. torch's global generators do not have this property: the loop
seeds them by process, and they are for random numbers that belong to no single sample, such as dropout.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vitarium.data.loader import mix


def player_key(player: str) -> int:
    """Return a number that depends only on the player's name, so that adding a player does not change another's random numbers."""
    return zlib.crc32(player.encode())


class Draws:
    """Random generators of one player's step.

    Successive calls within one forward pass give different numbers; `restart` begins at the first call again, so that a second pass over
    the same batch draws the same numbers as the first.

    Args:
        seed: of the recipe.
        step: optimizer step 0, 1, ...
        player: its name.
    """

    def __init__(self, seed: int, step: int, player: str):
        self.key = seed, step, player_key(player)
        self.calls = 0

    def restart(self) -> None:
        """Start at the first call again; the loop does this before each forward pass."""
        self.calls = 0

    def generators(self, positions: Tensor) -> Iterator[torch.Generator]:
        """Yield one CPU generator per sample; each is valid until the next one is taken.

        Args:
            positions: of the samples in the whole batch, (B,) int64.
        """
        call, self.calls = self.calls, self.calls + 1
        generator = torch.Generator()
        for position in positions.tolist():
            generator.manual_seed(mix(*self.key, position, call))
            yield generator

    def normal(self, positions: Tensor, *shape: int) -> Tensor:
        """Return standard normal numbers, (B, *shape) float32 on the CPU."""
        rows = [torch.randn(shape, generator=generator) for generator in self.generators(positions)]
        return torch.stack(rows) if rows else torch.empty(0, *shape)

    def uniform(self, positions: Tensor, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1), (B, *shape) float32 on the CPU."""
        rows = [torch.rand(shape, generator=generator) for generator in self.generators(positions)]
        return torch.stack(rows) if rows else torch.empty(0, *shape)


def positions_of(batch: dict[str, Any]) -> Tensor:
    """Return the positions (B,) int64 of a batch's samples in the whole batch; outside the loop, their indices in this batch."""
    known = batch.get("position")
    return known if known is not None else torch.arange(len(batch["image"]))
