"""Answers of a model for images, by its task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitarium.data.bad_files import BadFiles
from vitarium.data.loader import Loader
from vitarium.nn.modes import evaluating
from vitarium.training.evaluation import to_device
from vitarium.training.tasks.base import Task

if TYPE_CHECKING:
    from vitarium.data import ImageSet


def answers_of(
    task: Task, model: nn.Module, images: ImageSet, *, limit: int = 5, batch_size: int = 32
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, answer) for each image of a set; the answer for an unreadable one is {"error": reason}, and comes last.

    An answer of a batch of another size can differ in its last bits, because matrix products of other shapes add in another order.

    Args:
        task: of the model.
        model: in eval mode, on its device.
        images: their names (`describe`) are unique, or those of equal images.
        limit: length of ranked answers.
        batch_size: images per forward pass.
    """
    bad_files, place = BadFiles(1.0), next(model.parameters(), torch.empty(0))
    loader = Loader(images, task.transform(model), collate=task.collate, batch_size=batch_size, bad_files=bad_files)
    answered = set()
    with evaluating(model):
        for batch in loader.epoch(0):
            if not len(batch["index"]):
                continue
            batch = to_device({**batch, "image": batch["image"].to(place.dtype)}, place.device)
            for index, answer in zip(batch["index"].tolist(), task.answers(model, batch, limit=limit), strict=True):
                answered.add(index)
                yield index, answer
    reasons = dict(bad_files.items())
    for index in range(len(images)):
        if index not in answered:
            yield index, {"error": reasons[images.describe(index)]}


def shown(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an answer that are shown and written; the others are for `Task.draw`."""
    return {name: value for name, value in answer.items() if not name.startswith("_")}
