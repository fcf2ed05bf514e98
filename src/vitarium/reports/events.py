"""Events of a comparison, for live tables and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["started", "step", "measuring", "finished", "kept", "retried", "failed"]
"""
started: training begins or resumes; step: optimizer steps were taken; measuring: training is over, evaluation and timing run; finished:
the model is done; kept: an earlier run of the same comparison finished it; retried: it failed or lost its machine, and will start once
more; failed: it is given up, and the others continue.
"""


@dataclass(frozen=True)
class Event:
    """Event of one model.

    Args:
        kind: see `Kind`.
        model: name of the model.
        position: place among the models, from 0.
        count: number of models.
        step: optimizer steps taken.
        steps: their expected number (a budget in minutes is an estimate).
        fraction: share of this model's training that is done, 0 to 1.
        seconds_left: estimated rest of this model's training; None while unknown.
        loss: recent training loss.
        accuracy: on the held-out part, at the last evaluation, 0 to 1.
        score: name and value of the last evaluation's primary metric, of tasks without accuracy.
        message: reason of a failure.
    """

    kind: Kind
    model: str
    position: int
    count: int
    step: int = 0
    steps: int | None = None
    fraction: float = 0.0
    seconds_left: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    score: str = ""
    message: str = ""


Listener = Callable[[Event], None]
