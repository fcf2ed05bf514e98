"""Recommend a model by the one-standard-error rule of model selection.

Accuracies on a few hundred images are noisy: every model within one standard error of the most accurate counts as equally good, and the
fastest of those is recommended if it is clearly faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CLEARLY_FASTER = 1.25
"""Ratio of latencies from which a difference is worth an accuracy that is lower within the noise; timings vary by less than this."""


class Measured(Protocol):
    """A model as the rule needs it."""

    @property
    def name(self) -> str: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def evaluated(self) -> int: ...
    @property
    def latency_ms(self) -> float: ...


@dataclass(frozen=True)
class Recommendation:
    """Name of a model, and a sentence that gives the reason."""

    model: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def standard_error(accuracy: float, count: int) -> float:
    """Return the standard error of a share measured on `count` images: Wilson's, which stays above 0 where all are right (or wrong)."""
    if count < 1:
        return math.nan
    return math.sqrt(accuracy * (1 - accuracy) / count + 1 / (4 * count**2)) / (1 + 1 / count)


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Return the positions of the Pareto-optimal models: no other is at least as good in cost and accuracy, and better in one of them."""
    pairs = list(zip(costs, accuracies, strict=True))

    def dominated(i: int) -> bool:
        cost, accuracy = pairs[i]
        return any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in pairs)

    return [i for i in range(len(pairs)) if not dominated(i)]


def recommend(models: Sequence[Measured]) -> Recommendation:
    """Return the recommended model.

    Args:
        models: at least one, evaluated on the same images.
    """
    best = min(models, key=lambda m: (-m.accuracy, m.latency_ms))
    error = standard_error(best.accuracy, best.evaluated)
    as_good = [m for m in models if m.accuracy >= best.accuracy - error]
    fastest = min(as_good, key=lambda m: (m.latency_ms, -m.accuracy))
    noise = f"one standard error, {100 * error:.1f} points on {best.evaluated} held-out images"
    if len(models) == 1:
        return Recommendation(best.name, f"{best.name} reaches {_percent(best)}; there is no other model to compare it with.")
    if fastest is not best and best.latency_ms >= CLEARLY_FASTER * fastest.latency_ms:
        ratio = best.latency_ms / fastest.latency_ms
        return Recommendation(
            fastest.name,
            f"Use {fastest.name}: at {_percent(fastest)} it is within the noise of the most accurate, {best.name} at {_percent(best)} "
            f"({noise}), and answers {ratio:.1f} times faster ({fastest.latency_ms:.2g} instead of {best.latency_ms:.2g} ms an image).",
        )
    others = [m for m in as_good if m is not best]
    reason = (
        f"{len(others)} of the others come within the noise"
        if len(others) > 1
        else f"{others[0].name} comes within the noise"
        if others
        else ""
    )
    rest = f"; {reason} ({noise}), but none is clearly faster" if others else f", ahead of all others by more than the noise ({noise})"
    return Recommendation(best.name, f"Use {best.name}: at {_percent(best)} it is the most accurate{rest}.")


def _percent(model: Measured) -> str:
    return f"{100 * model.accuracy:.1f} %"
