"""Random numbers of generated images: each image has its own stream, so that it does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitarium.errors import UsageError

WORD = 2**64


class ImageNoise:
    """Streams of random numbers, one per image, keyed by (seed, image number).

    They are drawn on the CPU with the counter-based generator Philox (Salmon et al. 2011), whose key contains both numbers in full: the
    same image gets the same numbers in every batch, on every device and in every process.

    Args:
        seed: of all images, 0 to 2^64 - 1.
        indices: numbers of the images (B,) in a longer list, 0 or more; an image number always gets the same stream, and no two pairs of
            seed and number share one.

    Raises:
        UsageError: a seed out of range, or a negative number.
    """

    def __init__(self, seed: int, indices: Tensor):
        numbers = indices.tolist()
        if not 0 <= seed < WORD or any(number < 0 for number in numbers):
            raise UsageError(
                f"the seed (below 2^64) and the numbers of images must be 0 or more, got seed {seed} and numbers from "
                f"{min(numbers, default=0)}"
            )
        self.keys = [(seed, number) for number in numbers]
        self.streams = [np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64))) for key in self.keys]

    def __len__(self) -> int:
        return len(self.streams)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers (B, *shape), float32."""
        return self._drawn(lambda stream: stream.standard_normal(shape, dtype=np.float32))

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers (B, *shape) in [0, 1), float64."""
        return self._drawn(lambda stream: stream.random(shape))

    def exponential(self, *shape: int) -> Tensor:
        """Return standard exponential numbers (B, *shape), float32."""
        return self._drawn(lambda stream: stream.standard_exponential(shape, dtype=np.float32))

    def torch_generators(self) -> list[torch.Generator]:
        """Return PyTorch generators, one per image, for diffusers' schedulers; they are seeded from the streams' next numbers."""
        return [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in self.streams]

    def _drawn(self, draw: Callable[[np.random.Generator], Any]) -> Tensor:
        return torch.stack([torch.from_numpy(draw(stream)) for stream in self.streams])


def numbered(labels: Tensor, indices: Tensor | None) -> Tensor:
    """Return the numbers (B,) of the images of a batch: `indices`, or by default 0, 1, ....

    Raises:
        UsageError: the count of indices differs from that of labels.
    """
    if indices is None:
        return torch.arange(len(labels))
    if indices.shape != labels.shape:
        raise UsageError(f"indices must hold one number per image, {tuple(labels.shape)}; got {tuple(indices.shape)}")
    return indices
