"""The library's recipes as rows, read from their files without importing anything else.

A recipe's file begins with a comment, whose first line says what it trains; `objective` names its learner (classification, if it is
missing) and `model` its model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from vitarium.catalog.index import read_index

CLASSIFICATION = "classification"


@dataclass(frozen=True)
class RecipeRow:
    """A recipe of the library.

    Attributes:
        name: as `vitarium train NAME` takes it.
        summary: first line of its header.
        learner: how it teaches.
        task: of the models that it trains; "" if the index does not hold the learner.
        model: that it trains by default; "" if it names none.
    """

    name: str
    summary: str
    learner: str
    task: str
    model: str


def recipe_rows() -> list[RecipeRow]:
    """Return the library's recipes, sorted by name."""
    files = resources.files("vitarium").joinpath("training", "recipes").iterdir()
    texts = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")}
    return [_row(name, texts[name]) for name in sorted(texts)]


def _row(name: str, text: str) -> RecipeRow:
    summary = text.splitlines()[0].lstrip("# ").strip() if text else ""
    section = re.search(r"^objective:(.*(?:\n[ \t]+.*)*)", text, re.MULTILINE)
    learner = re.search(r"(?:^|[\s{,])name:\s*([\w-]+)", section[1]) if section else None
    model = re.search(r"^model:[ \t]*([^\s#]+)", text, re.MULTILINE)
    taught = learner[1] if learner else CLASSIFICATION
    task = (read_index().task(taught) or "").partition(":")[0]
    return RecipeRow(name, summary, taught, task, model[1] if model else "")


def task_of_name(model: str) -> str | None:
    """Return the task of a model by its name; None for a name that the index does not hold."""
    if "/" in model:
        return (read_index().task(CLASSIFICATION) or "").partition(":")[0]
    found = read_index().models.get(model.partition(".")[0])
    return None if found is None else (read_index().task(found[0].learner) or "").partition(":")[0]
