"""The order of the samples of an epoch, a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitarium.errors import DataError

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def shuffled(count: int, seed: int, epoch: int) -> Numbers:
    """Return a permutation of the samples 0 to count - 1."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def balanced(classes: Numbers, seed: int, epoch: int) -> Numbers:
    """Return as many samples as there are, in random order, of which every class has equally many (to one).

    Images of rare classes occur several times, and those of frequent ones in turn: each is used once before any of its class is used again
    within an epoch.

    Args:
        classes: class number of each sample, (N,).
    """
    generator = np.random.default_rng([seed, epoch])
    present = generator.permutation(np.unique(classes))  # the first ones get the remainder, others in every epoch
    each, more = divmod(len(classes), len(present))
    chosen = []
    for place, number in enumerate(present):
        members = np.flatnonzero(classes == number)
        wanted = each + (place < more)
        rounds = [generator.permutation(members) for _ in range(-(-wanted // len(members)))]
        chosen.append(np.concatenate(rounds)[:wanted] if rounds else members[:0])
    return generator.permutation(np.concatenate(chosen))


def class_numbers(targets: Sequence[Any]) -> Numbers:
    """Return the class number of each sample as an array.

    Raises:
        DataError: targets that are no class numbers, or of a single class.
    """
    plain = isinstance(targets, np.ndarray) or all(isinstance(target, int | np.integer) for target in targets)
    found: Numbers = np.asarray(targets if plain else [], dtype=np.int64)
    if found.ndim != 1 or len(np.unique(found)) < 2:
        raise DataError(
            "balanced sampling needs images with one class number each, known before they are read, of two classes or more; "
            "this data has none; leave out sampling=balanced"
        )
    return found
