"""The training loop, one sequence of operations for all learners.

    a step:   phase and values of the step -> batches -> for each player that is due, in their order:
    a turn:   generators from (seed, step, rank, player) -> rates of the step -> gradients by the player's stepper, accumulated over the
              batches -> clip -> finite in all processes? -> optimizer;   then the learner's hook and the moving averages

A step does not depend on the loop's history: the data are a function of (seed, epoch, step), rates, phases and values of the step,
random numbers of (seed, step, rank, player). A run resumed from a checkpoint therefore ends with the weights of an uninterrupted one, bit
for bit.
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

from vitarium.errors import TrainingStopped
from vitarium.files import write_json
from vitarium.training.base import Batch
from vitarium.training.checkpoint import LAST
from vitarium.training.held_out import evaluate
from vitarium.training.processes import same_on_all
from vitarium.training.run import Run
from vitarium.training.turns import Outcome, Seat, StepBatches, Turn, kept_buffers, restore_buffers, seed_step

log = logging.getLogger("vitarium")

PATIENCE = 3
"""Number of consecutive turns of a player without finite loss and gradient after which training stops."""


@dataclass(frozen=True)
class Step:
    """Result of one step.

    Attributes:
        outcomes: results of the turns.
        indices: the samples of its batches, in this process.
        stop, save: whether to stop; whether to save. The same in all processes.
    """

    outcomes: list[Outcome]
    indices: list[list[int]]
    stop: bool
    save: bool


def train(run: Run) -> None:
    """Take the remaining steps; evaluate, log and save at intervals and at the end.

    Raises:
        TrainingStopped: losses or gradients were not finite repeatedly.
        KeyboardInterrupt: after SIGINT or SIGTERM; the state is saved.
        DataError: samples cannot be read (see `Loader.epoch`).
    """
    state = run.state
    suspects: dict[str, list[dict[str, Any]]] = {}
    run.report(None)  # the first step may take long
    while True:
        if run.evaluation_due:
            evaluate(run)
        if state.step == state.total_steps or run.stalled:
            break
        run.enter(state.step)
        began = time.perf_counter()
        step = take_step(run, run.stream())
        state.seconds += time.perf_counter() - began
        state.step += 1
        run.changed = False
        for outcome in step.outcomes:
            judge(run, outcome, step, suspects.setdefault(outcome.seat.name, []))
        run.note(step.outcomes)
        if state.step % run.recipe.log_every == 0:
            run.write_line()
        run.report(step.outcomes)
        if step.stop:
            run.leave()
        if step.save:
            run.save()
    state.finished = True
    run.save(last=True)


def take_step(run: Run, batches: Iterator[Batch]) -> Step:
    """Take one step: the turns of all players that are due, on the same batches."""
    learner, state = run.learner, run.state
    due = [seat for seat in run.seats if seat.due(state.step)]
    again = len(due) > 1 or any(seat.stepper.passes > 1 for seat in due)
    step_batches = StepBatches(batches, run.recipe.accumulate, again=again)
    seed_step(run, run.seats[0].name)
    learner.before_step(state.step, state.total_steps)
    outcomes, stop, save = [], False, False
    for seat in due:
        outcome, stop_now, save_now = take_turn(run, seat, step_batches)
        outcomes.append(outcome)
        stop, save = stop or stop_now, save or save_now
    for _ in step_batches if not due else ():
        pass  # no player used these batches; the next step starts after them
    if any(outcome.finite for outcome in outcomes):
        learner.after_step(state.step, state.total_steps)
    for outcome in outcomes:
        if outcome.finite and outcome.seat.average:
            outcome.seat.average.update(state.step // outcome.seat.player.every + 1)
    return Step(outcomes, step_batches.indices, stop, save)


def take_turn(run: Run, seat: Seat, batches: StepBatches) -> tuple[Outcome, bool, bool]:
    """Take one player's turn; it changes nothing if a loss or gradient is not finite. Also return whether to stop and whether to save.

    During the turn the other players' parameters do not require gradients; after it their buffers are restored.
    """
    run.listen_to(seat)
    kept = [statistic.clone() for statistic in run.statistics]  # of batch norms, which the forward pass changes
    guarded = kept_buffers(seat.guarded)
    try:
        losses, norm = Turn(run, seat, batches).take()
    except BaseException:  # the checkpoint after it is that of the step before
        _restore(run.statistics, kept)
        raise
    finally:
        restore_buffers(guarded)
    broken = not math.isfinite(float(norm + losses["loss"]))
    broken, stop, save = same_on_all(run.fabric, broken, run.stop.requested, run.save_due)
    if broken:
        _restore(run.statistics, kept)
    else:
        run.changed = True
        seat.optimizer.step()
    return Outcome(seat, losses, norm, not broken), stop, save


@torch.no_grad()
def _restore(statistics: list[Tensor], kept: list[Tensor]) -> None:
    for statistic, value in zip(statistics, kept, strict=True):
        statistic.copy_(value)


def judge(run: Run, outcome: Outcome, step: Step, suspects: list[dict[str, Any]]) -> None:
    """Count a skipped turn.

    Raises:
        TrainingStopped: it was the player's third consecutive one.
    """
    state, name = run.state, outcome.seat.name
    if outcome.finite:
        state.in_a_row[name] = 0
        suspects.clear()
        return
    state.skips[name] = state.skips.get(name, 0) + 1
    state.in_a_row[name] = state.in_a_row.get(name, 0) + 1
    suspects.append(describe(run, outcome, step))
    if state.in_a_row[name] >= PATIENCE:
        raise give_up(run, suspects)


def describe(run: Run, outcome: Outcome, step: Step) -> dict[str, Any]:
    """Log a skipped turn, and return its description for the file that lists them."""
    number, seat = run.state.step - 1, outcome.seat
    loss, norm = float(outcome.losses["loss"]), float(outcome.norm)
    who = f" of the {seat.name}" if len(run.seats) > 1 else ""
    log.warning("step %d%s skipped: loss %g, gradient norm %g", number, who, loss, norm)
    images = run.loader.dataset
    names = [[images.describe(i) for i in batch] for batch in step.indices] if hasattr(images, "describe") else []
    where = {"step": number, "player": seat.name, "lr": seat.rates.at(number) if seat.rates else 0.0}
    return {**where, "loss": str(loss), "grad_norm": str(norm), "indices": step.indices, "images": names}


def give_up(run: Run, suspects: list[dict[str, Any]]) -> TrainingStopped:
    """Write the batches of the skipped turns to a file beside the last good checkpoint, and return the error that ends the run."""
    last = suspects[-1]
    if not run.fabric.broadcast((run.folder / LAST).exists()):  # an existing one is kept: it is older than the bad steps
        run.save(last=True)
    path = run.folder / f"not_finite_step{last['step']}_rank{run.fabric.global_rank}.json"
    write_json(path, suspects)
    who = f" of the player {last['player']}" if len(run.seats) > 1 else ""
    key = f"players.{last['player']}." if len(run.seats) > 1 else ""
    kept = f"no checkpoint is kept: {run.save_error}" if run.save_error else "the last good checkpoint is kept"
    return TrainingStopped(
        f"loss or gradient{who} was not finite in {PATIENCE} steps in a row, up to step {last['step']} (loss {last['loss']}, gradient norm "
        f"{last['grad_norm']}, lr {last['lr']:.3g}); the batches are listed in {path}, {kept}. "
        f"A lower {key}optimizer.lr, a longer {key}schedule.warmup, {key}clip.norm or precision=32-true often helps"
    )
