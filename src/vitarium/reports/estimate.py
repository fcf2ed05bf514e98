"""Estimate of the time of a comparison before it starts, from the speed of each model's forward pass on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitarium.catalog.calling import call, example_inputs
from vitarium.data import ImageData
from vitarium.efficiency.profiler import count_macs
from vitarium.nn.modes import evaluating
from vitarium.pages import lasting
from vitarium.reports.trial import suitable_threads
from vitarium.training import Recipe, find_learner

STEP = 3.0
"""Time of an optimizer step over that of its forward pass: the backward pass costs two of them."""
MARGIN = 1.25
"""Further time of images, optimizer and evaluations."""
TIMED_SECONDS = 2.0
"""A pass that would take longer is not timed with the whole batch, but with one image."""
LONG = 2 * 3600.0
"""Seconds from which shorter ways are suggested."""


@dataclass(frozen=True)
class Estimate:
    """Expected seconds of training by model, at most one of whose passes was timed.

    Attributes:
        seconds: by name; models that could not be built are left out.
        steps: optimizer steps of each; None for a budget in minutes.
    """

    seconds: dict[str, float]
    steps: int | None

    def text(self) -> str:
        """Return the estimate as one sentence, and where it is long, ways to shorten it."""
        total = sum(self.seconds.values())
        longest = sorted(self.seconds.items(), key=lambda pair: -pair[1])
        parts = ", ".join(f"{name} {lasting(seconds)}" for name, seconds in longest[:4])
        rest = f", {len(longest) - 4} more {lasting(sum(s for _, s in longest[4:]))}" if len(longest) > 4 else ""
        text = f"Estimated time: {lasting(total)}" + (f" ({parts}{rest})" if len(longest) > 1 else "")
        return text if total < LONG else f"{text}. {self._advice(longest)}"

    def _advice(self, longest: list[tuple[str, float]]) -> str:
        fewer = [] if self.steps is None else [f"fewer steps (--steps {self._round(self.steps)} takes {lasting(LONG / 2)})"]
        fewer = fewer or ["fewer minutes (--minutes)"]
        name, seconds = longest[0]
        if len(longest) > 1 and seconds > 2 * longest[-1][1]:
            fewer.append(f"smaller models ({name} takes {seconds / sum(s for _, s in longest):.0%} of the time)")
        return f"Shorter: {', '.join(fewer)}, or a cluster (--engine ray)."

    def _round(self, steps: int) -> int:
        share = LONG / 2 / sum(self.seconds.values())
        return max(1, round(steps * share / 10) * 10 if steps * share > 20 else round(steps * share))


def estimate(names: Sequence[str], data: ImageData, recipe: Recipe, *, gpu: bool) -> Estimate:
    """Return the expected time of training models one after the other on this machine. Random numbers go on as if nothing had happened.

    A budget in steps or epochs is taken times `STEP` forward passes of a batch.

    Args:
        names: of the models that are not trained yet.
        data: that they will be trained on.
        recipe: with the budget.
        gpu: whether they are trained on the machine's accelerator, if it has one.
    """
    if recipe.budget.minutes is not None:
        return Estimate(dict.fromkeys(names, 60 * recipe.budget.minutes), None)
    epochs = recipe.budget.epochs or 0
    steps = recipe.budget.steps or max(1, round(epochs * max(1, len(data.train) // recipe.batch_size)))
    found = {}
    for name in names:
        seconds = _forward_seconds(name, data, recipe, gpu=gpu)
        if seconds is not None:
            found[name] = STEP * MARGIN * steps * seconds
    return Estimate(found, steps)


def _forward_seconds(name: str, data: ImageData, recipe: Recipe, *, gpu: bool) -> float | None:
    """Return the seconds of a forward pass of one batch; None if the model cannot be built or called, which its training will explain."""
    try:
        with torch.random.fork_rng(devices=[]):
            model = find_learner(recipe.objective["name"]).create(name, data, recipe, pretrained=False).eval_model()
            model.to("cuda" if gpu and torch.cuda.is_available() else "cpu")
            with suitable_threads(count_macs(model)), evaluating(model, inference=True):
                return _timed(model, recipe.batch_size)
    except Exception:  # an estimate is no reason to stop, and models of other libraries raise all kinds of errors
        return None


def _timed(model: nn.Module, batch: int) -> float:
    def seconds(count: int) -> float:
        inputs: dict[str, Any] = {k: v.to(place) if hasattr(v, "to") else v for k, v in example_inputs(model, count).items()}
        begin = time.perf_counter()
        call(model, inputs)
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        return time.perf_counter() - begin

    place = next(model.parameters()).device
    seconds(1)  # the first call allocates
    one = seconds(1)
    return one * batch if one * batch > TIMED_SECONDS else min(seconds(batch) for _ in range(2))
