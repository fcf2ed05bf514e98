"""The loop: every learner of the house is trained here, by one explicit sequence.

    a step:  generators from (seed, step, rank)  ->  rates of the step  ->  gradients, accumulated over batches (with SAM once more,
             uphill)  ->  clip  ->  finite in all processes?  ->  optimizer, the learner's hook, moving average

Nothing of a step depends on how the loop got there: the data are a function of (seed, epoch, step), the rates of the step, the random
numbers of (seed, step, rank). So a run that goes on from a checkpoint ends with the weights of an unbroken one, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitarium.data.loader import mix, seed_generators
from vitarium.errors import DataError, TrainingStopped
from vitarium.files import write_json
from vitarium.training.base import Batch
from vitarium.training.checkpoint import LAST
from vitarium.training.evaluation import to_device
from vitarium.training.optim import Rates, clip_gradients, uphill
from vitarium.training.run import Run, same_on_all

log = logging.getLogger("vitarium")

PATIENCE = 3
"""Steps in a row without a finite loss and gradient before training stops."""


@dataclass(frozen=True)
class Step:
    """What came of one step.

    Attributes:
        losses: means over its batches, on the device.
        norm: of the gradient before clipping, on the device.
        indices: the samples of its batches, in this process.
        finite, stop, save: whether loss and gradient are finite; whether to stop; whether to save. The same in all processes.
    """

    losses: dict[str, Tensor]
    norm: Tensor
    indices: list[list[int]]
    finite: bool
    stop: bool
    save: bool


def train(run: Run) -> None:
    """Take the steps that remain; evaluate, log and save on the way, and at the end.

    Raises:
        TrainingStopped: losses or gradients stay not finite, or the last checkpoint could not be written.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the state is saved.
        DataError: samples cannot be read (see `Loader.epoch`).
    """
    state, rates = run.state, run.rates
    assert rates is not None
    batches = run.batches()
    suspects: list[dict[str, Any]] = []
    while True:
        if run.evaluation_due:
            run.evaluate()
        if state.step == state.total_steps:
            break
        began = time.perf_counter()
        step = take_step(run, batches, rates)
        state.seconds += time.perf_counter() - began
        state.step += 1
        if step.finite:
            state.in_a_row = 0
            suspects.clear()
            for meters in run.meters.values():
                meters.add(step.losses)
        else:
            state.skipped += 1
            state.in_a_row += 1
            suspects.append(describe(run, step, rates))
            if state.in_a_row >= PATIENCE:
                raise give_up(run, suspects)
        if state.step % run.recipe.log_every == 0:
            run.write_line(step.norm)
        run.tell(step.losses)
        if step.stop:
            run.leave()
        if step.save:
            run.save()
    state.finished = True
    run.save()
    run.check_saved()


def take_step(run: Run, batches: Iterator[Batch], rates: Rates) -> Step:
    """One step of the optimizer; left out, with nothing changed, where a loss or gradient is not finite."""
    fabric, learner, state, recipe = run.fabric, run.learner, run.state, run.recipe
    seed_step(run)
    learner.before_step(state.step, state.total_steps)
    rates.apply(run.optimizer, state.step)
    run.optimizer.zero_grad()
    kept = [statistic.clone() for statistic in run.statistics]  # batch norm's, which the forward pass changes
    losses, indices = gradients(run, batches)
    norm = clip_gradients(run.parameters, recipe.clip) if losses else torch.tensor(math.nan)
    losses = losses or {"loss": norm}
    broken = not math.isfinite(float(norm + losses["loss"]))
    broken, stop, save = same_on_all(fabric, broken, run.stop.requested, run.save_due)
    if broken:
        for statistic, value in zip(run.statistics, kept, strict=True):
            statistic.copy_(value)
    else:
        run.optimizer.step()
        learner.after_step(state.step, state.total_steps)
        if run.ema:
            run.ema.update(state.step + 1)
    return Step(losses, norm, indices, not broken, stop, save)


def gradients(run: Run, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """As `accumulate`; under SAM the gradients are those of the weights moved uphill, the losses those of the weights themselves."""
    sam = run.recipe.optimizer.sam
    if sam is None:
        return accumulate(run, batches)
    same = [next(batches) for _ in range(run.recipe.accumulate)]
    losses, indices = accumulate(run, iter(same))
    if losses:
        with uphill(run.parameters, run.learner.buffers(), sam):
            run.optimizer.zero_grad()
            accumulate(run, iter(same))
    return losses, indices


def accumulate(run: Run, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Gradients of one step's batches into `.grad`; their mean losses, and the samples seen. Empty where no image could be read."""
    fabric, count = run.fabric, run.recipe.accumulate
    seed_step(run)  # a second pass draws what the first one drew
    means: dict[str, Tensor] = {}
    indices: list[list[int]] = []
    for number in range(count):
        batch = next(batches)
        indices.append(batch["index"].tolist())
        if not indices[-1]:
            if fabric.world_size > 1:
                raise DataError(f"none of a batch's {run.recipe.batch_size} images can be read in process {fabric.global_rank}")
            continue
        with fabric.no_backward_sync(run.module, enabled=number < count - 1):
            losses = run.module(to_device(batch, fabric.device))
            fabric.backward(losses["loss"] / count)
        for name, value in losses.items():
            mean = value.detach() / count
            means[name] = means[name] + mean if name in means else mean
    return means, indices


def seed_step(run: Run) -> None:
    """All generators from (seed, step, rank), so that nothing random of a step depends on the steps before it."""
    key = run.recipe.seed, run.state.step, run.fabric.global_rank
    seed_generators(*key)
    if run.fabric.device.type != "cpu":
        torch.get_device_module(run.fabric.device).manual_seed(mix(*key))


def describe(run: Run, step: Step, rates: Rates) -> dict[str, Any]:
    """A step that was left out, for the log and the dump."""
    number = run.state.step - 1
    loss, norm = float(step.losses["loss"]), float(step.norm)
    log.warning("step %d skipped: loss %g, gradient norm %g", number, loss, norm)
    images = run.loader.dataset
    names = [[images.describe(i) for i in batch] for batch in step.indices] if hasattr(images, "describe") else []
    return {"step": number, "lr": rates.at(number), "loss": str(loss), "grad_norm": str(norm), "indices": step.indices, "images": names}


def give_up(run: Run, suspects: list[dict[str, Any]]) -> TrainingStopped:
    """The error that ends a run whose losses stay not finite; the batches are in a file beside the last good checkpoint."""
    last = suspects[-1]
    if not run.fabric.broadcast((run.folder / LAST).exists()):  # else it stays: it is older, and surely good
        run.save()
    path = run.folder / f"not_finite_step{last['step']}_rank{run.fabric.global_rank}.json"
    write_json(path, suspects)
    return TrainingStopped(
        f"loss or gradient was not finite in {PATIENCE} steps in a row, up to step {last['step']} (loss {last['loss']}, gradient norm "
        f"{last['grad_norm']}, lr {last['lr']:.3g}); the batches are listed in {path}, the last good checkpoint is kept. "
        "A lower optimizer.lr, a longer schedule.warmup, clip.norm or precision=32-true often helps"
    )
