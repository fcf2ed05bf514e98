"""Parts of a claim: arms to train, measured values, and comparisons with their verdicts."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vitarium.catalog import find_system, systems
from vitarium.claims.judging import Range
from vitarium.errors import UsageError

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
        exact: the values were counted and do not depend on chance (MACs, parameters, an identity).
        images: number of held-out images behind each value; None where that is no question.
    """

    label: str
    values: Sequence[float]
    unit: str = ""
    exact: bool = False
    images: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A question: does the method's value exceed the baseline's by `at_least`? Higher is better.

    It is answered only if it is calibrated: the better arm reaches a floor, no arm a ceiling, the test part is large enough, and there are
    enough seeds for the gain (see `judging.uncalibrated`). Exact values need no calibration.

    Args:
        says: the comparison in a few words.
        method: the arm that the paper proposes.
        baseline: the other arm; None compares the method's values with `at_least` itself.
        at_least: the gain that the paper claims, in the unit of the values; negative for "no worse than".
        within: floor and ceiling of the arms' values.
        margin: asks instead whether the two are equal, up to this difference.

    Raises:
        ValueError: both `at_least` and `margin`, or a margin without a baseline.
    """

    says: str
    method: Arm | Measured
    baseline: Arm | Measured | None = None
    at_least: float = 0.0
    within: Range | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and (self.at_least or self.baseline is None or self.margin <= 0):
            raise ValueError(f"{self.says!r}: a margin is positive, needs a baseline and excludes at_least")

    @property
    def exact(self) -> bool:
        """Return whether no value depends on chance."""
        return all(isinstance(arm, Measured) and arm.exact for arm in (self.method, self.baseline) if arm is not None)


@dataclass(frozen=True)
class Claim:
    """A registered claim.

    Attributes:
        says: the sentence that is checked.
        minutes: expected on two cores.
        compare: function that measures or defines the comparisons.
        task: what is learned, and why it needs the mechanism; "" if nothing is trained.
        weights: pretrained weights that it uses; "" for none.
    """

    slug: str
    says: str
    minutes: float
    compare: Callable[[], list[Comparison]]
    task: str = ""
    weights: str = ""

    @property
    def method(self) -> str:
        """Return the description of the measurement, the function's docstring."""
        return " ".join((self.compare.__doc__ or "").split())


_CLAIMS: dict[str, Claim] = {}


def claim(
    slug: str, *, says: str, minutes: float, task: str = "", weights: str = ""
) -> Callable[[Callable[[], Sequence[Comparison | Arm]]], Callable[[], Sequence[Comparison | Arm]]]:
    """Register a system's claim.

    Args:
        slug: the system.
        says: the sentence that is checked.
        minutes: expected on two CPU cores; about 5, at most 15.
        task: what is learned, and why it needs the mechanism.
        weights: pretrained weights that it uses.

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
        _CLAIMS[slug] = Claim(slug, says, minutes, compare, task, weights)
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
