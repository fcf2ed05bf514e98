"""Options of `vitarium train` that are short for keys of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitarium.assignments import split_assignment
from vitarium.errors import UsageError, nearest

KEYS = {
    "epochs": "budget.epochs",
    "steps": "budget.steps",
    "lr": "optimizer.lr",
    "batch_size": "batch_size",
    "image_size": "image_size",
    "log": "log",
}
"""Option -> the key of a recipe that it sets."""
LOGGERS = ("tensorboard", "wandb", "mlflow")
"""Names that a recipe accepts under `log`. A test compares them with the recipe."""

FORM = "a change has the form KEY=VALUE, such as optimizer.lr=1e-4"


def with_shorthands(changes: Sequence[str], options: Mapping[str, Any], *, searched: str | None = None) -> list[str]:
    """Return changes of a recipe with those of the options added.

    Args:
        changes: "KEY=VALUE" each.
        options: values by name of the option (see `KEYS`); None for those that are not given.
        searched: an option whose value is found later, and which is checked only.

    Raises:
        UsageError: a key that is set twice, or two lengths of the training.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "epochs" in given and "steps" in given:
        raise UsageError("give epochs or steps, not both: each is the whole length of the training")
    set_here = [split_assignment(change, FORM)[0] for change in changes]
    for name in [*given, *([searched] if searched else [])]:
        key = KEYS[name]
        whole = "budget" if key.startswith("budget.") else key  # each of the budget's keys replaces the others
        if twice := [other for other in set_here if f"{other}.".startswith(f"{whole}.") or f"{key}.".startswith(f"{other}.")]:
            raise UsageError(
                f"--{name.replace('_', '-')} is short for --set {key}=..., and --set {twice[0]}=... is given too; leave one out"
            )
    return [*changes, *(f"{KEYS[name]}={_text(value)}" for name, value in given.items())]


def _text(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def names_of_loggers(log: Sequence[str] | str | None) -> list[str] | None:
    """Return the names of loggers from a list, or from text with commas.

    Raises:
        UsageError: there is no such logger.
    """
    if log is None:
        return None
    names = [name.strip() for name in log.split(",") if name.strip()] if isinstance(log, str) else list(log)
    for name in names:
        if name not in LOGGERS:
            raise UsageError(f"unknown logger {name!r}{nearest(name, LOGGERS)} (loggers: {', '.join(LOGGERS)}; '' is log.csv alone)")
    return names


def batch_number(text: str | None) -> int | str | None:
    """Return the number of a batch that was given as text; "auto" and None stay.

    Raises:
        UsageError: neither a whole number above 0 nor "auto".
    """
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size takes a whole number from 1 up, or auto; got {text!r}")
    return int(text)
