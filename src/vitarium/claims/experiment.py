"""Parts of a claim: arms to train, measured values, and comparisons with their verdicts."""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vitarium.catalog import find_system, systems
from vitarium.errors import UsageError

Verdict = Literal["held", "not held", "inconclusive"]


TO_THE_END = ("objective.loss.label_smoothing=0.1", "objective.mixing.until=1.0")
"""Changes of the recipe "pico" under which the claims were calibrated: smoothed labels, and mixing to the end of the training."""


@dataclass(frozen=True)
class Arm:
    """A model trained from scratch, once per seed; its value is the accuracy on the held-out part, in percent.

    Args:
        label: name in the ledger.
        model: as for `create_model`.
        options: arguments of the model.
        data: as for `open_data`.
        image_size: side of the input, pixels; None: the model's own.
        steps: optimizer steps, the budget; or
        seconds: of training, if equal time is compared.
        seeds: number of seeds; they are 0, 1, ... and set initial weights, order and augmentation.
        recipe: training recipe.
        overrides: of the recipe, such as {"optimizer.lr": 1e-3}.
        val_fraction: share of the data that is held out.

    Raises:
        ValueError: not exactly one budget, or no seed.
    """

    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "digits"
    image_size: int | None = None
    steps: int | None = None
    seconds: float | None = None
    seeds: int = 3
    recipe: str = "pico"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    val_fraction: float = 0.2

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"arm {self.label!r} needs exactly one budget, steps or seconds")
        if self.seeds < 1:
            raise ValueError(f"arm {self.label!r} needs at least one seed, got {self.seeds}")

    def key(self) -> str:
        """Return the settings that determine its value, as text; the label is not among them."""
        return json.dumps(asdict(self) | {"label": ""}, sort_keys=True)


@dataclass(frozen=True)
class Measured:
    """Values that the claim's function measured, one per seed or round.

    Args:
        label: name in the ledger.
        values: the measurements.
        unit: unit of the values, such as "x faster" or "MACs ratio".
    """

    label: str
    values: Sequence[float]
    unit: str = ""


@dataclass(frozen=True)
class Comparison:
    """A question: does the method's value exceed the baseline's by `at_least`? Higher is better.

    Args:
        says: the comparison in a few words.
        method: the arm that the paper proposes.
        baseline: the other arm; None compares the method's values with `at_least` itself.
        at_least: the gain that the paper claims, in the unit of the values; negative for "no worse than".
    """

    says: str
    method: Arm | Measured
    baseline: Arm | Measured | None = None
    at_least: float = 0.0


def gain_and_error(method: Sequence[float], baseline: Sequence[float] | None) -> tuple[float, float]:
    """Return the mean gain and its standard error, paired by seed or round if both have as many values, else of independent means."""
    if baseline is None:
        return statistics.mean(method), _standard_error(method)
    if len(method) == len(baseline):
        differences = [m - b for m, b in zip(method, baseline, strict=True)]
        return statistics.mean(differences), _standard_error(differences)
    error = (_standard_error(method) ** 2 + _standard_error(baseline) ** 2) ** 0.5
    return statistics.mean(method) - statistics.mean(baseline), error


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def judge(gain: float, error: float, at_least: float) -> Verdict:
    """Return "held" if the gain exceeds the required one by two standard errors, "not held" if below by two, else "inconclusive"."""
    if gain - 2 * error >= at_least:
        return "held"
    return "not held" if gain + 2 * error < at_least else "inconclusive"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several comparisons: held if all hold, not held if one does not."""
    if "not held" in verdicts:
        return "not held"
    return "held" if all(v == "held" for v in verdicts) else "inconclusive"


@dataclass(frozen=True)
class Claim:
    """A registered claim: its sentence, its expected time on two cores, and the function that defines the comparisons."""

    slug: str
    says: str
    minutes: float
    compare: Callable[[], list[Comparison]]

    @property
    def method(self) -> str:
        """Return the description of the measurement, the function's docstring."""
        return " ".join((self.compare.__doc__ or "").split())


_CLAIMS: dict[str, Claim] = {}


def claim(
    slug: str, *, says: str, minutes: float
) -> Callable[[Callable[[], Sequence[Comparison | Arm]]], Callable[[], Sequence[Comparison | Arm]]]:
    """Register a system's claim.

    Args:
        slug: the system.
        says: the sentence that is checked.
        minutes: expected on two CPU cores; at most about three.

    The function returns comparisons, or two arms for the one question whether the first is better. Its docstring describes the measurement
    and the result that would refute the claim.
    """
    find_system(slug)

    def register(function: Callable[[], Sequence[Comparison | Arm]]) -> Callable[[], Sequence[Comparison | Arm]]:
        def compare() -> list[Comparison]:
            found = list(function())
            if len(found) == 2 and all(isinstance(f, Arm) for f in found):
                found = [Comparison(f"{found[0].label} over {found[1].label}", *found)]  # type: ignore[union-attr, arg-type, list-item]
            return found  # type: ignore[return-value]

        compare.__doc__ = function.__doc__
        _CLAIMS[slug] = Claim(slug, says, minutes, compare)
        return function

    return register


def find_claim(slug: str) -> Claim:
    """Return the claim of a system.

    Raises:
        UsageError: unknown slug, or a system without a claim.
    """
    find_system(slug)
    if slug not in claimed_slugs():
        raise UsageError(f"{slug} has no claim yet; those with one: {', '.join(claimed_slugs())}")
    importlib.import_module(f"vitarium.claims.{slug}")
    return _CLAIMS[slug]


def claimed_slugs() -> list[str]:
    """Return the systems with a claim, in the order of systems.toml. Imports none of them."""
    return [s.slug for s in systems() if importlib.util.find_spec(f"vitarium.claims.{s.slug}")]
