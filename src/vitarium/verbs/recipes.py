"""List the library's recipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vitarium.catalog.index import read_index
from vitarium.catalog.recipes import RecipeRow, recipe_rows, task_of_name
from vitarium.catalog.search import unknown_model
from vitarium.errors import UsageError, nearest
from vitarium.pages.tables import TableData
from vitarium.verbs.result import Result


@dataclass(repr=False)
class Recipes(Result):
    """Recipes.

    Attributes:
        rows: name, summary, learner, task and model of each.
    """

    rows: list[RecipeRow]

    def facts(self) -> dict[str, Any]:
        return {"recipes": len(self.rows)}

    def tables(self) -> list[TableData]:
        rows = [[row.name, row.task, row.learner, row.model or "-", row.summary] for row in self.rows]
        return [TableData("", ["recipe", "task", "learner", "~model", "~what it trains"], rows)]

    def to_dict(self) -> dict[str, Any]:
        return {"recipes": [asdict(row) for row in self.rows]}


def recipes(model: str | None = None, *, task: str | None = None) -> Recipes:
    """List the library's recipes, from their files alone: no model is built and torch is not imported.

    Args:
        model: only recipes that train models of this one's task: its name.
        task: only recipes of this task, such as "classify".

    Raises:
        UsageError: unknown model or task.
    """
    rows = recipe_rows()
    tasks = sorted({row.task for row in rows if row.task})
    if task is not None and task not in read_index().names("tasks"):
        raise UsageError(f"unknown task {task!r}{nearest(task, tasks)} (tasks of recipes: {', '.join(tasks)})")
    wanted = {task} - {None}
    if model is not None:
        if (own := task_of_name(model)) is None:
            raise unknown_model(model)
        wanted |= {own}
    return Recipes([row for row in rows if wanted <= {row.task}])
