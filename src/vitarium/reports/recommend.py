"""Recommend a model; by the one-standard-error rule of model selection where the standard error is known.

Accuracies on a few hundred images are noisy: every model within one standard error of the most accurate counts as equally good, and the
fastest of those is recommended if it is clearly faster. Of other metrics one run gives no spread: the best model is recommended.

No model is recommended that is not better than an answer which no model gives (the constant one, or regression on the pixels): a lead that
is no larger than one standard error of the difference counts as none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vitarium.training.tasks import Metric
from vitarium.training.tasks.classify import ACCURACY

CLEARLY_FASTER = 1.25
"""Ratio of latencies from which a difference is worth an accuracy that is lower within the noise; timings vary by less than this."""


class Measured(Protocol):
    """A model as the rule needs it."""

    @property
    def name(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def evaluated(self) -> int: ...
    @property
    def latency_ms(self) -> float: ...


@dataclass(frozen=True)
class Baseline:
    """Score of an answer that no model gives.

    Attributes:
        name: such as "constant answer".
        score: value of the primary metric.
        evaluated: number of held-out images.
    """

    name: str
    score: float
    evaluated: int


@dataclass(frozen=True)
class Recommendation:
    """Name of a model, and a sentence that gives the reason.

    Attributes:
        model: the recommended one; the best one, where no model beats the baselines.
        sentence: the reason, or what to do.
        beats_baselines: whether the model is worth using.
    """

    model: str
    sentence: str
    beats_baselines: bool = True

    def __str__(self) -> str:
        return self.sentence


def standard_error(accuracy: float, count: int) -> float:
    """Return the standard error of a share measured on `count` images: Wilson's, which stays above 0 where all are right (or wrong)."""
    if count < 1:
        return math.nan
    return math.sqrt(accuracy * (1 - accuracy) / count + 1 / (4 * count**2)) / (1 + 1 / count)


def pareto_front(costs: Sequence[float], scores: Sequence[float], metric: Metric = ACCURACY) -> list[int]:
    """Return the positions of the Pareto-optimal models: no other is at least as good in cost and score, and better in one of them."""
    pairs = [(cost, metric.rank(score)) for cost, score in zip(costs, scores, strict=True)]

    def dominated(i: int) -> bool:
        cost, rank = pairs[i]
        return any(c <= cost and r <= rank and (c, r) != (cost, rank) for c, r in pairs)

    return [i for i in range(len(pairs)) if not dominated(i)]


def unbeaten(models: Sequence[Measured], baselines: Sequence[Baseline], metric: Metric = ACCURACY) -> Baseline | None:
    """Return the best of the baselines if no model is better by more than one standard error of the difference; None otherwise."""
    if not baselines:
        return None
    best = min(models, key=lambda model: metric.rank(model.score))
    strongest = min(baselines, key=lambda baseline: metric.rank(baseline.score))
    lead = metric.rank(strongest.score) - metric.rank(best.score)
    return None if lead > error_of_difference(best, strongest, metric) else strongest


def error_of_difference(model: Measured, baseline: Baseline, metric: Metric) -> float:
    """Return the standard error of the difference of two shares of images; 0 for other metrics, whose error is not known."""
    if not metric.share_of_images or min(model.evaluated, baseline.evaluated) < 1:
        return 0.0
    return math.hypot(standard_error(model.score, model.evaluated), standard_error(baseline.score, baseline.evaluated))


def recommend(
    models: Sequence[Measured], metric: Metric = ACCURACY, baselines: Sequence[Baseline] = (), *, published: bool = False
) -> Recommendation:
    """Return the recommended model.

    Args:
        models: at least one, evaluated on the same images.
        metric: of their scores.
        baselines: answers that a model must beat.
        published: whether one of the models could start from published weights instead, which is then advised.
    """
    best = min(models, key=lambda m: (metric.rank(m.score), m.latency_ms))
    if (above := unbeaten(models, baselines, metric)) is not None:
        ways = ["train longer", *(["start from published weights (--pretrained)"] if published else []), "or give more images"]
        advice = (", " if published else " ").join(ways) + "; and check the labels"
        words = not_better(best, above, metric)
        return Recommendation(best.name, f"{words[0].upper()}{words[1:]}. {advice[0].upper()}{advice[1:]}.", beats_baselines=False)
    if len(models) == 1:
        reached = metric.short(best.score) if metric.share_of_images else f"{metric.label} {metric.short(best.score)}"
        return Recommendation(best.name, f"{best.name} reaches {reached}; there is no other model to compare it with.")
    if metric.share_of_images:
        return _within_noise(models, best, metric)
    second = min((m for m in models if m is not best), key=lambda m: metric.rank(m.score))
    return Recommendation(
        best.name,
        f"Use {best.name}: it has the best {metric.label}, {metric.short(best.score)}, before {second.name} with "
        f"{metric.short(second.score)}. The spread between runs is not known: with one run a model, a small difference may be chance.",
    )


def not_better(best: Measured, baseline: Baseline, metric: Metric) -> str:
    """Return the words for a best model that does not beat a baseline."""
    scores = f"{metric.text(baseline.score)} against {metric.text(best.score)}"
    if metric.rank(best.score) >= metric.rank(baseline.score):
        return f"no model is better than {baseline.name} ({scores} of {best.name}, the best)"
    error, images = 100 * error_of_difference(best, baseline, metric), min(best.evaluated, baseline.evaluated)
    return (
        f"no model is clearly better than {baseline.name} ({scores} of {best.name}, the best; the standard error of the difference is "
        f"{error:.1f} points on {images} held-out images)"
    )


def _within_noise(models: Sequence[Measured], best: Measured, metric: Metric) -> Recommendation:
    """Apply the one-standard-error rule to shares of the held-out images."""
    error = standard_error(best.score, best.evaluated)
    as_good = [m for m in models if metric.rank(m.score) <= metric.rank(best.score) + error]
    fastest = min(as_good, key=lambda m: (m.latency_ms, metric.rank(m.score)))
    noise = f"one standard error, {100 * error:.1f} points on {best.evaluated} held-out images"
    if fastest is not best and best.latency_ms >= CLEARLY_FASTER * fastest.latency_ms:
        ratio = best.latency_ms / fastest.latency_ms
        return Recommendation(
            fastest.name,
            f"Use {fastest.name}: at {metric.short(fastest.score)} it is within the noise of the most accurate, {best.name} at "
            f"{metric.short(best.score)} ({noise}), and answers {ratio:.1f} times faster "
            f"({fastest.latency_ms:.2g} instead of {best.latency_ms:.2g} ms an image).",
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
    return Recommendation(best.name, f"Use {best.name}: at {metric.short(best.score)} it is the most accurate{rest}.")
