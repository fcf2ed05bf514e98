"""List the methods, their options, and which of them fit a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from vitarium.catalog.index import read_index
from vitarium.errors import UsageError, nearest
from vitarium.files import is_model_file
from vitarium.pages.tables import TableData
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from torch import nn

FAMILIES: Mapping[str, str] = {
    "pruning": "prune",
    "tokens": "reduce",
    "adaptation": "adapt",
    "quantization": "quantize",
    "explanation": "explain",
}
"""Family of methods -> their kind, in the order in which methods are applied."""

NEEDS: Mapping[str, str] = {"none": "nothing", "images": "images (--data)", "required": "training afterwards"}


@dataclass(frozen=True)
class MethodRow:
    """A method.

    Attributes:
        name: as --apply takes it.
        family: pruning, tokens, adaptation, quantization or explanation.
        training: what it needs beside a trained model: "none", "images" for calibration, or "required".
        summary: first sentence of its description.
        options: {"name", "default", "help"} of each.
        fits: whether the model takes it, with its default options; None: no model was given.
        reason: why not; "" where it fits.
    """

    name: str
    family: str
    training: str
    summary: str
    options: list[dict[str, Any]]
    fits: bool | None = None
    reason: str = ""


@dataclass(repr=False)
class Methods(Result):
    """Methods.

    Attributes:
        model: file or name of the model that they were tried on; None: none.
        rows: the methods.
        shows_options: whether the tables describe the options.
    """

    model: str | None
    rows: list[MethodRow]
    shows_options: bool = False

    def facts(self) -> dict[str, Any]:
        fit = {} if self.model is None else {"fit": ", ".join(row.name for row in self.rows if row.fits) or "none"}
        return {"methods": ", ".join(row.name for row in self.rows), **fit}

    def tables(self) -> list[TableData]:
        tried = self.model is not None
        table = TableData("", ["method", "family", "needs", *(["fits"] if tried else []), "~options", "~what it does"])
        for row in sorted(self.rows, key=lambda row: not row.fits) if tried else self.rows:
            options = ", ".join(f"{option['name']}={shown(option['default'])}" for option in row.options)
            answer = [] if row.fits is None else ["yes" if row.fits else "no"]
            table.rows.append([row.name, row.family, NEEDS[row.training], *answer, options, row.reason or row.summary])
        details = TableData("Options", ["method", "option", "~default", "~meaning"])
        for row in self.rows:
            details.rows.extend([[row.name, option["name"], shown(option["default"]), option["help"]] for option in row.options])
        return [table, details] if self.shows_options else [table]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "methods": [asdict(row) for row in self.rows]}


def methods(
    model: str | os.PathLike[str] | nn.Module | None = None,
    *,
    family: Literal["pruning", "tokens", "adaptation", "quantization", "explanation"] | None = None,
    training: Literal["none", "images", "required"] | None = None,
    options: bool = False,
) -> Methods:
    """List the methods that `apply` and `compress` take; with a model, whether it takes each, and why not.

    Without a model only the index is read, and torch is not imported. A model's name is built without weights. Methods are tried with their
    default options; nothing is calibrated.

    Args:
        model: a model's name, a file of `vitarium.save`, or a model, which is not changed; None: no model.
        family: only methods of this family.
        training: only methods that need this beside a trained model: "none", "images" for calibration, "required" training afterwards.
        options: whether the tables describe every option.

    Raises:
        UsageError: unknown model, family or need.
        CheckpointError: a file that cannot be read.
    """
    if family is not None and family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}{nearest(family, FAMILIES)} (families: {', '.join(FAMILIES)})")
    if training is not None and training not in NEEDS:
        raise UsageError(f"training must be {', '.join(NEEDS)}, got {training!r}{nearest(training, NEEDS)}")
    found = [row for row in _rows() if family in (None, row.family) and training in (None, row.training)]
    if model is None:
        return Methods(None, found, options)
    from vitarium.catalog.applying import fitting_methods
    from vitarium.verbs.opening import name_of

    reasons = fitting_methods(_opened(model))
    tried = [MethodRow(**{**asdict(row), "fits": not reasons[row.name], "reason": reasons[row.name]}) for row in found]
    return Methods(name_of(model), tried, options)


def _rows() -> list[MethodRow]:
    families = {kind: family for family, kind in FAMILIES.items()}
    indexed = {name: row for entry in read_index().entries.values() for name, row in entry.methods.items()}
    rows = [MethodRow(name, families[row["kind"]], row["training"], row["summary"], row["options"]) for name, row in indexed.items()]
    return sorted(rows, key=lambda row: (list(FAMILIES).index(row.family), row.name))


def _opened(model: str | os.PathLike[str] | nn.Module) -> nn.Module:
    """Return a model to try the methods on; by name, without weights on the meta device."""
    import torch

    import vitarium

    if not isinstance(model, str | os.PathLike):
        return model
    if is_model_file(model):
        return vitarium.load(os.fspath(model))
    with torch.device("meta"):
        return vitarium.create_model(os.fspath(model))


def shown(default: Any) -> str:
    """Return the default of an option as --apply takes it."""
    if isinstance(default, list):
        return f"[{','.join(map(shown, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
