"""Conditions on a model's cost, written as "params<30M", "gmacs<=5" or "mb<100"."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from vitarium.errors import UsageError

QUANTITIES = {"params": 1, "macs": 1, "gmacs": 1e9, "mb": 1e6}
SUFFIXES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
OPERATORS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
FORM = re.compile(r"\s*(params|gmacs|macs|mb)\s*(<=|>=|<|>)\s*(\d+(?:\.\d+)?)\s*([KMG]?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """A bound on one quantity: "params", "macs" or "mb" (of weights), in parameters, MACs or bytes."""

    quantity: str
    compare: Callable[[float, float], bool]
    bound: float

    def holds(self, value: float | None) -> bool:
        """Return whether a value of the quantity satisfies the condition; an unknown value (None) does not."""
        return value is not None and self.compare(value, self.bound)


def parse(text: str) -> Condition:
    """Parse a condition.

    Raises:
        UsageError: the text is not of the form QUANTITY OPERATOR NUMBER[K|M|G].
    """
    match = FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"cannot read the condition {text!r}; write params, macs, gmacs or mb, then < <= > >=, then a number: 'params<30M'"
        )
    quantity = match[1].lower()
    bound = float(match[3]) * SUFFIXES[match[4].upper()] * QUANTITIES[quantity]
    return Condition("macs" if quantity == "gmacs" else quantity, OPERATORS[match[2]], bound)
