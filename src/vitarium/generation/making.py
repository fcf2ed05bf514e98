"""Generation of many images in batches, in one process or several."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitarium.engine import Engine, map_images
from vitarium.errors import UsageError, nearest


def make_images(
    model: Any,
    labels: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 64,
    engine: str | Engine = "local",
    parts: str | os.PathLike[str] | None = None,
    identity: Any = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
    **options: Any,
) -> Tensor:
    """Return one image for each label, (N, C, H, W) float32 in [0, 1], on the CPU.

    Image i depends on the seed and i alone: neither batch_size nor the engine changes it (by more than 1e-5).

    Args:
        model: a `Generator`; with `image` and `mask` among the options an `Editor`.
        labels: class numbers, one per image.
        seed: of all random numbers.
        batch_size: images at once.
        engine, parts, identity, progress: as for `engine.map_images`.
        options: of the model's `generate` (or `edit`).

    Raises:
        UsageError: an option that the model does not have, or a value that it does not accept.
    """
    items = list(enumerate(labels))
    values = map_images(
        _make_part,
        items,
        shared=(model, {"seed": seed, **options}),
        part_size=batch_size,
        engine=engine,
        parts=parts,
        identity=identity,
        progress=progress,
    )
    return torch.cat(values)


def _make_part(items: Sequence[tuple[int, int]], model: Any, options: Mapping[str, Any]) -> Tensor:
    """Make one batch: items are (number of the image, class)."""
    call = model.edit if "image" in options else model.generate
    numbers, labels = (torch.tensor(column) for column in zip(*items, strict=True))
    try:
        return call(labels=labels, indices=numbers, **options).cpu()
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        known = [name for name in inspect.signature(model.generate).parameters if name not in ("self", "labels", "indices")]
        word = str(error).rpartition("argument ")[2].strip("'")
        raise UsageError(f"{type(model).__name__} takes no option {word!r}{nearest(word, known)}") from error
