"""Early stopping: whether a run has stopped improving, and the weights of its best evaluation.

Both follow from the history of evaluations, so that a resumed run stops at the step of an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitarium.errors import UsageError
from vitarium.files import atomic_path
from vitarium.training.base import Learner
from vitarium.training.lengths import Stopping
from vitarium.training.recipe import Recipe

BEST = "best.ckpt"
"""Weights of the best evaluation in the folder of a run with early stopping."""

log = logging.getLogger("vitarium")


def check_stopping(learner: Learner, recipe: Recipe) -> None:
    """Check that early stopping is possible.

    Raises:
        UsageError: the learner has no metrics, or phases change the image size, so that kept weights would not fit the final model.
    """
    if recipe.stopping is None:
        return
    if learner.metrics() is None:
        raise UsageError(f"{type(learner).__name__} has no metrics of held-out images, which stopping needs; leave out stopping")
    if any(phase.image_size for phase in recipe.phases):
        raise UsageError(
            "stopping keeps the weights of the best evaluation, which phases of several image sizes do not support; leave one out"
        )


def best_of(history: Sequence[dict[str, Any]], metric: str, best: str) -> int | None:
    """Return the place of the best evaluation, the first of equals; None without any finite value.

    Args:
        history: entries of the evaluations.
        metric: name of the primary metric.
        best: whether "max" or "min" is better.
    """
    improved = _improvements(history, metric, best, 0.0)
    return improved[-1] if improved else None


def is_over(history: Sequence[dict[str, Any]], metric: str, best: str, stopping: Stopping) -> bool:
    """Return whether the last `patience` evaluations brought no improvement by more than `min_delta`."""
    improved = _improvements(history, metric, best, stopping.min_delta)
    return len(history) - 1 - (improved[-1] if improved else -1) >= stopping.patience


def _improvements(history: Sequence[dict[str, Any]], metric: str, best: str, least: float) -> list[int]:
    """Return the places of the evaluations that were better than all before by more than `least`."""
    found: list[int] = []
    top = -math.inf
    for place, entry in enumerate(history):
        value = float(entry.get(metric, math.nan)) * (1 if best == "max" else -1)
        if value > top + least if found else math.isfinite(value):
            found, top = [*found, place], value
    return found


def save_best(folder: Path, step: int, model: nn.Module) -> None:
    """Write the weights of the best evaluation; a disk that is full causes a warning."""
    try:
        with atomic_path(folder / BEST) as temporary:
            torch.save({"step": step, "weights": model.state_dict()}, temporary)
    except OSError as error:
        log.warning("cannot write %s (%s); training continues", folder / BEST, error.strerror or error)


def load_best(folder: Path, step: int, model: nn.Module) -> bool:
    """Load the weights of the best evaluation, which was at `step`; return whether they were there."""
    try:
        content = torch.load(folder / BEST, map_location="cpu", weights_only=True)
        if content["step"] == step:
            model.load_state_dict(content["weights"])
            return True
        reason = f"it is of step {content['step']}"
    except Exception as error:  # a missing or damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    log.warning(
        "the best evaluation was at step %d, but its weights cannot be read from %s (%s); the last ones are kept",
        step,
        folder / BEST,
        reason,
    )
    return False
