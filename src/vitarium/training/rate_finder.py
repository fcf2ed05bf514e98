"""A learning-rate finder: the loss of a copy of the model while the rate rises exponentially."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitarium.data import ImageData
from vitarium.data.loader import generators_kept
from vitarium.errors import UsageError
from vitarium.training.base import Learner
from vitarium.training.fitting import prepare_run, set_up_run
from vitarium.training.lengths import Budget
from vitarium.training.loop import take_step
from vitarium.training.processes import create_fabric
from vitarium.training.recipe import Recipe

SMOOTHING = 0.8
"""Share of the previous mean in the mean of the losses that is judged."""
DIVERGED = 3.0
"""The sweep ends where the mean loss exceeds its minimum by this factor of the fall before."""
LEAST = 10
"""Number of steps before which the sweep does not end."""


@dataclass(frozen=True)
class Sweep:
    """Result of a sweep.

    Attributes:
        rates: value of `optimizer.lr` at each step.
        losses: loss of each step.
        means: exponential mean of the losses, without the bias of its beginning.
        suggestion: the rate at which the mean falls most steeply over the logarithm of the rate.
        clear: whether the mean fell by more than the losses of the first steps vary; else the suggestion may be chance.
    """

    rates: list[float]
    losses: list[float]
    means: list[float]
    suggestion: float
    clear: bool = True


class Rising:
    """Rates of a sweep, in place of a schedule: from `low` to `high`, each step by the same factor.

    Args:
        factor: of the recipe's scaling with the batch, from `optimizer.lr` to the rate of a step.
    """

    def __init__(self, low: float, high: float, steps: int, factor: float):
        self.low, self.high, self.steps, self.factor = low, high, steps, factor

    def setting(self, step: int) -> float:
        """Return the value of `optimizer.lr` at a step."""
        return self.low * (self.high / self.low) ** (step / max(1, self.steps - 1))

    def at(self, step: int) -> float:
        """Return the rate of a step."""
        return self.setting(step) * self.factor

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of every group, times its lr_scale."""
        for group in optimizer.param_groups:
            group["lr"] = self.at(step) * group.get("lr_scale", 1.0)
        return self.at(step)


def sweep_rates(
    learner: Learner,
    data: ImageData,
    recipe: Recipe,
    *,
    steps: int = 100,
    low: float = 1e-5,
    high: float = 1.0,
    accelerator: str = "auto",
) -> Sweep:
    """Train a copy of a learner with a rising rate; the learner, and all random generators, stay as they are.

    Args:
        learner: with one player.
        data: its training images are used in the recipe's order.
        recipe: for everything but the rate, its schedule and the moving average.
        steps: at most; the sweep ends early where the loss diverges.
        low, high: first and last rate.
        accelerator: "auto", "cpu", "cuda", "mps".

    Raises:
        UsageError: several players, rates or steps out of range, or a loss that is not finite from the beginning.
        DataError: fewer images than a batch.
    """
    if steps < LEAST or not 0 < low < high:
        raise UsageError(f"a sweep takes at least {LEAST} steps and rates 0 < low < high, got steps={steps}, low={low}, high={high}")
    if len(learner.players()) > 1:
        raise UsageError(f"{type(learner).__name__} trains several players, whose rates a sweep cannot separate; set them by hand")
    short = recipe.model_copy(update=dict(budget=Budget(steps=steps), ema=None, stopping=None, log=(), phases=(), values={}))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with tempfile.TemporaryDirectory() as folder, generators_kept(), torch.random.fork_rng(devices):
        fabric = create_fabric(1, 1, "auto", accelerator, short.precision)
        fabric.launch()
        run, _ = prepare_run(fabric, copy.deepcopy(learner), data, short, Path(folder), None)
        try:
            set_up_run(run, None)
            reference = short.optimizer.reference_batch
            rising = Rising(low, high, steps, run.images_per_step / reference if reference else 1.0)
            losses = _losses(run, rising)
        finally:
            run.loader.close()
            run.val_loader.close()
            if run.logs:
                run.logs.close()
    if len(losses) < LEAST:
        raise UsageError(f"the loss is not finite from step {len(losses)} of the sweep on, at a rate of {rising.setting(len(losses)):.2g}")
    return judged([rising.setting(step) for step in range(len(losses))], losses)


def _losses(run: Any, rising: Rising) -> list[float]:
    """Return the losses of the steps of a sweep, up to where it diverges."""
    run.seats[0].rates = rising
    losses: list[float] = []
    while len(losses) < rising.steps:
        run.enter(run.state.step)
        (outcome,) = take_step(run, run.stream()).outcomes
        if not outcome.finite:
            break
        losses.append(float(outcome.losses["loss"]))
        run.state.step += 1
        means = smoothed(losses)
        if len(means) > LEAST and means[-1] - min(means) > DIVERGED * max(means[0] - min(means), 0.1 * abs(means[0])):
            break
    return losses


def smoothed(losses: list[float]) -> list[float]:
    """Return the exponential mean of the values up to each place."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**count))
    return found


def judged(rates: list[float], losses: list[float]) -> Sweep:
    """Return the sweep of these losses, with its suggestion."""
    means = smoothed(losses)
    slopes = [_slope(rates, means, place) for place in range(len(means))]
    last = max(1, means.index(min(means)))  # beyond the minimum the rate is too high
    steepest = min(range(last), key=slopes.__getitem__)
    early = losses[: max(LEAST, len(losses) // 5)]
    fall = statistics.fmean(early) - min(means)
    return Sweep(rates, losses, means, rates[steepest], clear=fall > statistics.stdev(early))


def _slope(rates: list[float], means: list[float], place: int) -> float:
    """Return the slope of the means over the decimal logarithm of the rate, by a line through the half decade on either side."""
    near = [i for i, rate in enumerate(rates) if abs(math.log10(rate / rates[place])) <= 0.5]
    if len(near) < 3:
        return math.inf
    return statistics.linear_regression([math.log10(rates[i]) for i in near], [means[i] for i in near]).slope
