"""List the library's recipes, or every setting of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vitarium.catalog.index import lacking, read_index
from vitarium.catalog.recipes import RecipeRow, recipe_rows, task_of_name
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


@dataclass(frozen=True)
class Setting:
    """A setting of a recipe: a value as `--set KEY=VALUE` takes it, and whether the recipe's file sets it or it is a default."""

    key: str
    value: str
    source: str


@dataclass(repr=False)
class RecipeSettings(Recipes):
    """All settings of a recipe, with the defaults of the keys that its file does not set.

    Attributes:
        rows: the library's recipes for the same task.
        name: of the recipe, or its file.
        settings: in the order of a recipe's keys.
    """

    name: str
    settings: list[Setting]

    def facts(self) -> dict[str, Any]:
        return {"recipe": self.name, **{row.key: row.value for row in self.settings if row.source == "recipe"}}

    def tables(self) -> list[TableData]:
        rows = [[row.key, row.value, row.source] for row in self.settings]
        return [TableData(self.name, ["key", "~value", "from"], rows)]

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.name, "settings": [asdict(row) for row in self.settings]}


def recipes(name: str | None = None, *, task: str | None = None) -> Recipes:
    """List the library's recipes, from their files alone (no model is built and torch is not imported); or every setting of one.

    Args:
        name: a recipe's name or YAML file, to get its settings too (a `RecipeSettings`); or a model's name, for recipes that train models
            of its task. A few models have the name of their recipe.
        task: only recipes of this task, such as "classify".

    Raises:
        UsageError: unknown name or task.
    """
    rows = recipe_rows()
    if name is not None and (name.endswith((".yaml", ".yml")) or any(row.name == name for row in rows)):
        if task is not None:
            raise UsageError(f"{name} is a recipe; --task selects among recipes, so leave one out")
        return settings_of(name, rows)
    tasks = sorted({row.task for row in rows if row.task})
    if task is not None and task not in read_index().names("tasks"):
        raise UsageError(f"unknown task {task!r}{nearest(task, tasks)} (tasks of recipes: {', '.join(tasks)})")
    wanted = {task} - {None}
    if name is not None:
        if (own := task_of_name(name)) is None:
            from vitarium.data.opening import EMBEDDED

            if name in EMBEDDED:
                raise UsageError(f"{name} is a data set, neither a recipe nor a model: every recipe takes it with --data {name}")
            if near := nearest(name, [*(row.name for row in rows), *read_index().models]):
                raise UsageError(f"no recipe and no model is called {name!r}{near}")
            raise UsageError(
                f"no recipe and no model is called {name!r}{lacking(name)} ('vitarium recipes' and 'vitarium models' list them)"
            )
        wanted |= {own}
    return Recipes([row for row in rows if wanted <= {row.task}])


def settings_of(name: str, rows: list[RecipeRow]) -> RecipeSettings:
    """Return all settings of a recipe, those of its learner included.

    Args:
        name: of the recipe, or its file.
        rows: all recipes of the library.

    Raises:
        UsageError: no such recipe, or a file that is not a valid one.
    """
    from vitarium.training.learners import find_learner
    from vitarium.training.opening import load_recipe

    recipe = load_recipe(name)
    whole, own = (recipe.model_dump(mode="json", by_alias=True, exclude_unset=unset) for unset in (False, True))
    settings = recipe.settings_of(find_learner(recipe.objective["name"]))
    whole["objective"] = {"name": recipe.objective["name"], **settings.model_dump(mode="json", by_alias=True)}
    given = dict(_flat("", own))
    task = (read_index().task(recipe.objective["name"]) or "").partition(":")[0]
    alike = [row for row in rows if row.task == task]
    return RecipeSettings(
        alike, name, [Setting(key, value, "recipe" if _is_set(key, given) else "default") for key, value in _flat("", whole)]
    )


def _is_set(key: str, given: dict[str, str]) -> bool:
    """Return whether a recipe sets a key, or a section that it belongs to (a list, or null)."""
    return key in given or any(key.startswith(f"{other}.") for other in given)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, value as text) of nested settings."""
    if isinstance(value, dict) and set(value) == {"amount", "unit"}:
        unit = "" if value["unit"] == "share" else f" {value['unit']}"
        yield prefix, f"{value['amount']:g}{unit}"
    elif isinstance(value, dict) and value and prefix != "values":  # their keys contain points
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    elif not prefix.startswith("budget.") or value is not None:  # of the budget, one of three keys is set
        yield prefix, _text(value)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        if set(value) == {"amount", "unit"}:
            return next(_flat("", value))[1]
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
