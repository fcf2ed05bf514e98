"""Progress of a run: for the progress callback, and as a line of log.csv."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitarium.training.run import Run

PROGRESS_SECONDS = 0.25
"""Seconds between two calls of the progress callback."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step, total_steps: optimizer steps done, and total.
        epoch: passes over the training part, with fraction.
        loss: of the last step; with several players, the sum of theirs.
        lr: the last step's learning rate; with several players, the first one's.
        images_per_second: over all processes, since the last call.
        seconds: spent in training steps, over all sessions of the run.
        metrics: numbers of the last evaluation.
        losses: the last loss of each player.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    images_per_second: float
    seconds: float
    metrics: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)


def progress_of(run: Run, losses: dict[str, float] | None, speed: float) -> Progress:
    """Return the progress of a run.

    Args:
        losses: last loss of each player; None: the means of the last evaluation.
        speed: images per second.
    """
    state = run.state
    last = state.history[-1] if state.history else {}
    metrics = {name: value for name, value in last.items() if name not in ("step", "epoch", "seconds", "lr")}
    if losses is None:
        losses = {seat.name: metrics.get(f"train_{run.named(seat, 'loss')}", math.nan) for seat in run.seats}
    lr = run.lr(run.seats[0], state.step - 1)
    return Progress(state.step, state.total_steps, run.epoch, sum(losses.values()), lr, speed, state.seconds, metrics, losses)


def line_of(run: Run, means: dict[str, float], norms: dict[str, float]) -> dict[str, Any]:
    """Return a line of log.csv: means since the line before, and each player's learning rate and count of skipped steps.

    Args:
        means: of several players, these include the norms of their gradients.
        norms: of the last gradient of each player; logged for a single player.
    """
    state, numbers = run.state, dict[str, Any]()
    for seat in run.seats:
        numbers[run.named(seat, "lr")] = run.lr(seat, state.step - 1)
        if len(run.seats) == 1:
            numbers["grad_norm"] = norms.get(seat.name, math.nan)
        numbers[run.named(seat, "skipped")] = state.skips.get(seat.name, 0)
    speed = state.step * run.images_per_step / state.seconds if state.seconds else 0.0
    return {"step": state.step, "epoch": run.epoch, **means, **numbers, "seconds": state.seconds, "images_per_second": speed}
