"""Statistics of batch norms for evaluation, where a training is too short for their running averages.

A batch norm with momentum m averages its statistics over about 1/m updates, starting from mean 0 and variance 1. MaxViT's momentum of 0.01
suits its 300 epochs of ImageNet; after 300 steps its averages are still those of the first steps, and the model at chance level in
evaluation although its training loss is low. Such statistics are estimated from training images instead (Wu and Johnson, Rethinking
"Batch" in BatchNorm, 2021, "precise batch norm"): before each evaluation, and kept in the final model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from vitarium.nn.modes import eval_mode
from vitarium.training.base import Batch, Learner
from vitarium.training.evaluation import to_device
from vitarium.training.recipe import Recipe

log = logging.getLogger("vitarium")

IMAGES = 512
"""Training images from which statistics are estimated."""

MEMORIES = 20
"""Least length of a training in units of 1/momentum for which running averages are used."""

USUAL = 0.1
"""Momentum from which running averages are always used: torch's default."""

Norm = nn.modules.batchnorm._NormBase


def batch_norms(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Norm]:
    """Return the normalisations of a model that keep running statistics, by name.

    Args:
        names: a subset of them; None: those in training mode.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, Norm) and m.track_running_stats and m.running_mean is not None}
    return {n: m for n, m in found.items() if (m.training if names is None else n in names)}


def too_slow(norm: Norm, updates: int) -> bool:
    """Return whether the momentum is below `USUAL`, and a training of this many updates under `MEMORIES` times the memory of the running
    averages."""
    return norm.momentum is None or (norm.momentum < USUAL and norm.momentum * updates < MEMORIES)


@contextlib.contextmanager
def batch_norms_set(recipe: Recipe, learner: nn.Module) -> Iterator[None]:
    """Set the recipe's momentum of batch norms, or put them into evaluation mode if they are frozen; restore both on exit."""
    settings = recipe.batch_norm
    before = [(m, m.momentum, m.training) for m in learner.modules() if isinstance(m, Norm)]
    for norm, momentum, training in before:
        norm.momentum = momentum if settings.momentum is None else settings.momentum
        norm.train(training and not settings.frozen)
    try:
        yield
    finally:
        for norm, momentum, training in before:
            norm.momentum = momentum
            norm.train(training)


def names_to_estimate(learner: Learner, recipe: Recipe, total_steps: int) -> list[str]:
    """Return the names of the batch norms of `learner.eval_model()` whose statistics are estimated before an evaluation.

    Frozen ones, which are in evaluation mode while the learner trains, keep their statistics.
    """
    norms = batch_norms(learner.eval_model())
    if recipe.batch_norm.estimate == "auto":
        return [name for name, norm in norms.items() if too_slow(norm, total_steps * recipe.accumulate)]
    return list(norms) if recipe.batch_norm.estimate else []


def report(learner: Learner, names: Iterable[str], total_steps: int) -> None:
    """Log that statistics are estimated, and why."""
    norms = batch_norms(learner.eval_model(), names)
    momenta = sorted({norm.momentum for norm in norms.values()}, key=lambda m: (m is not None, m))
    log.warning(
        "%d batch norms have the momentum %s, too small for %d steps: their statistics are estimated from up to %d training images before "
        "each evaluation and in the final model (batch_norm.estimate=false uses the running averages)",
        len(norms),
        ", ".join("none" if m is None else f"{m:g}" for m in momenta),
        total_steps,
        IMAGES,
    )


@torch.no_grad()
def estimate(
    learner: Learner,
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Batch],
    fabric: Fabric,
    *,
    autocast: Callable[[], Any] = contextlib.nullcontext,
) -> list[tuple[Tensor, Tensor]]:
    """Replace the running statistics of batch norms by their means over batches, and over all processes.

    Everything else is in evaluation mode (no dropout, no drop path), as when the statistics are used.

    Args:
        learner: calls the model, by `run_model`.
        model: `learner.eval_model()`, its moving average or its gathered copy.
        names: of the batch norms in it.
        batches: of training images.

    Returns:
        (buffer, former values) of all that was changed; empty if no batch had more than one image.
    """
    norms = list(batch_norms(model, set(names)).values())
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    momenta = [norm.momentum for norm in norms]
    place, seen = next(model.parameters()), 0
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
            norm.train()
        for batch in batches:
            if len(batch["index"]) > 1:  # a batch norm of one value per channel is undefined
                batch, seen = to_device(batch, fabric.device), seen + 1
                with autocast():
                    learner.run_model(model, {**batch, "image": batch["image"].to(place.dtype)})
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            if fabric.world_size > 1:
                together: Any = fabric.all_reduce(statistic, reduce_op="mean")
                statistic.copy_(together)
    restore(pair for pair in before if not seen or not pair[0].is_floating_point())  # the count of updates is the training's
    return before if seen else []


@torch.no_grad()
def restore(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Restore the buffers that `estimate` changed."""
    for buffer, values in before:
        buffer.copy_(values)


@torch.no_grad()
def copy_statistics(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Copy the running statistics of the named batch norms to another copy of the model."""
    there = batch_norms(target, set(names))
    for name, norm in batch_norms(source, set(names)).items():
        for mine, other in zip(norm.buffers(recurse=False), there[name].buffers(recurse=False), strict=True):
            other.copy_(mine)
