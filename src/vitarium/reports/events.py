"""What a comparison is doing, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["started", "step", "measuring", "finished", "kept", "failed"]
"""
started: training begins, or goes on; step: it moves; measuring: training is over, evaluation and timing run; finished: the model is done;
kept: it was done by an earlier run of the same comparison; failed: it cannot be compared, the others go on.
"""


@dataclass(frozen=True)
class Event:
    """One moment of one model.

    Args:
        kind: what happens, see `Kind`.
        model: its name.
        position: place among the models, from 0.
        count: number of models.
        step: optimizer steps done.
        steps: how many there will be, as far as known (a budget in minutes is an estimate).
        fraction: share of this model's training that is done, 0 to 1.
        seconds_left: of this model's training, estimated; None while unknown.
        loss: training loss, lately.
        accuracy: on the held-out part, at the last evaluation, 0 to 1.
        score: the last evaluation's most telling number with its name, of objectives that know no accuracy.
        message: why it failed.
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
