"""Verdicts on comparisons: the gain with its 95 % interval by Student's t, and whether the comparison was calibrated."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["held", "not held", "inconclusive"]

CONFIDENCE = 0.95
ACCURACY_CEILING = 97.0
"""Percent from which differences of accuracy say little: what is left are a few images and wrong labels."""
SMALL_GAIN = 3.0
"""Points; a smaller required gain needs at least `SEEDS` seeds."""
SEEDS = 5
TEST_IMAGES = 2000
"""Least number of held-out images: with 2,000 the standard error of an accuracy of 85 % is 0.8 points."""


@dataclass(frozen=True)
class Range:
    """Values between which a comparison can say something, in the unit of its arms.

    Args:
        floor: the better arm must reach it; below it, the task was not learned.
        ceiling: no arm may reach it; above it, no arm can be better than another.

    Raises:
        ValueError: the floor is not below the ceiling.
    """

    floor: float
    ceiling: float = ACCURACY_CEILING

    def __post_init__(self) -> None:
        if not self.floor < self.ceiling:
            raise ValueError(f"the floor must be below the ceiling, got {self.floor} and {self.ceiling}")


@dataclass(frozen=True)
class Gain:
    """Mean difference of two arms.

    Attributes:
        mean: method less baseline.
        error: standard error of the mean; 0 of a single value.
        low, high: 95 % interval by Student's t; infinite for a single value that is not exact.
    """

    mean: float
    error: float
    low: float
    high: float


def gain_of(method: Sequence[float], baseline: Sequence[float] | None, *, exact: bool = False) -> Gain:
    """Return the gain of a method, paired by seed or round if both have as many values, else of independent means (Welch).

    Args:
        method, baseline: values, one for each seed or round; None: the method's values themselves are the gain.
        exact: values without chance, such as counted MACs, so that a single one has an interval of no width.
    """
    if baseline is None or len(method) == len(baseline):
        differences = list(method) if baseline is None else [m - b for m, b in zip(method, baseline, strict=True)]
        mean, error, freedom = statistics.mean(differences), standard_error(differences), len(differences) - 1.0
    else:
        mean = statistics.mean(method) - statistics.mean(baseline)
        errors = [standard_error(method), standard_error(baseline)]
        error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        parts = [e**4 / (len(v) - 1) for e, v in zip(errors, (method, baseline), strict=True) if len(v) > 1 and e > 0]
        freedom = error**4 / sum(parts) if parts else float(min(len(method), len(baseline)) - 1)
    half = 0.0 if exact else half_width(error, freedom)
    return Gain(mean, error, mean - half, mean + half)


def half_width(error: float, freedom: float) -> float:
    """Return half the width of the 95 % interval of a mean with this standard error; infinite without degrees of freedom."""
    if freedom < 1:
        return float("inf")
    from scipy.stats import t

    return float(error * t.ppf(0.5 + CONFIDENCE / 2, freedom))


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def judge(gain: Gain, at_least: float) -> Verdict:
    """Return "held" if the whole interval reaches the required gain, "not held" if all of it is below, else "inconclusive"."""
    if gain.low >= at_least:
        return "held"
    return "not held" if gain.high < at_least else "inconclusive"


def judge_equal(gain: Gain, margin: float) -> Verdict:
    """Return "held" if the whole interval is within the margin on both sides of zero, "not held" if all of it is outside, else
    "inconclusive"."""
    if -margin <= gain.low and gain.high <= margin:
        return "held"
    return "not held" if gain.low > margin or gain.high < -margin else "inconclusive"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several comparisons: held if all hold, not held if one does not."""
    if "not held" in verdicts:
        return "not held"
    return "held" if all(v == "held" for v in verdicts) else "inconclusive"


def uncalibrated(
    within: Range | None, means: Sequence[float], *, unit: str, at_least: float, counts: Sequence[int], images: Sequence[int | None]
) -> str:
    """Return why a comparison cannot say anything; "" if it can.

    Args:
        within: floor and ceiling; None: none were named.
        means: mean of each arm.
        unit: of the values; "%" for accuracies.
        at_least: the gain that is looked for.
        counts: number of values of each arm.
        images: number of held-out images behind the values of each arm; None where that is no question.
    """
    if within is None:
        return "no floor and ceiling are named"
    if max(means) < within.floor:
        return f"the better arm reaches {max(means):.4g} {unit}, and the floor is {within.floor:g}"
    if max(means) >= within.ceiling:
        return f"an arm reaches {max(means):.4g} {unit}, and the ceiling is {within.ceiling:g}"
    known = [count for count in images if count is not None]
    if known and min(known) < TEST_IMAGES:
        return f"the test part has {min(known)} images, and {TEST_IMAGES} are needed"
    if unit == "%" and abs(at_least) < SMALL_GAIN and min(counts) < SEEDS:
        return f"{min(counts)} seeds, and a gain of {abs(at_least):g} points needs {SEEDS}"
    return ""
