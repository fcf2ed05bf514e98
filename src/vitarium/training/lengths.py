"""Lengths in a recipe: stretches of a training, its budget, and where it stops early."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vitarium.training.settings import Count, Section

MOST_STEPS, MOST_EPOCHS, MOST_MINUTES = 10**12, 10**9, 10**8
"""Largest lengths of a training; beyond them numbers of steps would overflow."""


class Span(Section):
    """A stretch of training: "5 epochs", "200 steps", or a share of the whole such as 0.05."""

    amount: Annotated[float, Field(ge=0, le=MOST_STEPS)]
    unit: Literal["epochs", "steps", "share"]

    @model_validator(mode="after")
    def _share_is_at_most_one(self) -> Span:
        if self.unit == "share" and self.amount > 1:
            raise ValueError("a share must be from 0 to 1")
        return self

    def steps(self, total: int, per_epoch: int) -> int:
        """Return its length in optimizer steps, for a training of `total` steps."""
        return round(self.amount * {"epochs": per_epoch, "steps": 1, "share": total}[self.unit])


def _span(value: Any) -> Any:
    if isinstance(value, dict | Span):
        return value
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(?:e(-?\d+))?\s*(epochs?|steps?|%)?\s*", str(value)) if not isinstance(value, bool) else None
    )
    if not found:
        raise ValueError("must be a share of the training from 0 to 1, 'N epochs' or 'N steps'")
    amount = float(f"{found[1]}e{found[2] or 0}")
    unit = (found[3] or "share").rstrip("s")
    amount, unit = (amount / 100, "share") if unit == "%" else (amount, unit)
    if unit == "share" and amount > 1:
        raise ValueError("must be a share of the training from 0 to 1, 'N epochs' or 'N steps'")
    if amount > MOST_STEPS:
        raise ValueError(f"must be at most {MOST_STEPS:,} {unit}s")
    return {"amount": amount, "unit": unit if unit == "share" else unit + "s"}


Stretch = Annotated[Span, BeforeValidator(_span)]


class Budget(Section):
    """Length of a training: exactly one of optimizer steps, passes over the data, or minutes of training (evaluation comes on top).

    Minutes are converted to steps once, from the speed of the first steps, so that a resumed run ends at the same step.
    """

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    epochs: Annotated[float, Field(gt=0, le=MOST_EPOCHS)] | None = None
    minutes: Annotated[float, Field(gt=0, le=MOST_MINUTES)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in ("steps", "epochs", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, epochs, minutes (given: {', '.join(given) or 'none'})")
        return self


def _evaluations(value: Any) -> Any:
    found = re.fullmatch(r"\s*(\d+)\s*(evaluations?)?\s*", value) if isinstance(value, str) else None
    return int(found[1]) if found else value


class Stopping(Section):
    """Early stopping: the training ends where evaluations no longer improve, and the weights of the best one are kept.

    Args:
        patience: number of evaluations in a row without an improvement after which it ends; "5 evaluations" or 5.
        min_delta: smallest change of the task's primary metric that counts as an improvement, in the metric's own unit (accuracies are
            shares of 1).
    """

    patience: Annotated[Count, BeforeValidator(_evaluations)]
    min_delta: Annotated[float, Field(ge=0)] = 0.0
