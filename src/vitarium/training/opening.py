"""Reading of recipes.

    recipe = load_recipe("deit", ["optimizer.lr=5e-4", "budget.epochs=100"])

The library's recipes are in `training/recipes/`; each begins with its command, expected time and expected result.
"""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from vitarium.errors import UsageError, nearest
from vitarium.files import is_model_file
from vitarium.training.learners import find_learner
from vitarium.training.recipe import EARLIER_KEYS, Recipe, earlier_keys_moved
from vitarium.training.settings import check, override, read_settings

LISTED = "'vitarium recipes' lists all recipes"


def list_recipes() -> list[str]:
    """Return the names of the library's recipes."""
    files = resources.files("vitarium.training").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe of the library, or a YAML file.

    Args:
        name_or_path: "deit", or a path that ends in .yaml or .yml.
        overrides: "KEY=VALUE" each, such as "optimizer.lr=1e-4"; one for the budget replaces the recipe's ("budget.steps=500"),
            and another "objective.name" starts from that learner's default settings. "loss." and "mixing." are short for
            "objective.loss." and "objective.mixing.".

    Raises:
        UsageError: no such recipe or file, or settings that are unknown, not used by the objective, or out of range; the
            message names key, bounds and near names.
    """
    name = str(name_or_path)
    if name in list_recipes():
        values = read_settings(Path(str(resources.files("vitarium.training").joinpath("recipes", f"{name}.yaml"))))
    elif name.endswith((".yaml", ".yml")):
        values = read_settings(name)
    else:
        raise unknown_recipe(name)
    return _checked(values, list(overrides or []), f"recipe {name}")


def unknown_recipe(name: str) -> UsageError:
    """Return the error for a name that is no recipe: with similar ones, or where a model, a file of one or data were named, the options
    that take them."""
    from vitarium.catalog.recipes import recipe_rows, task_of_name
    from vitarium.data.opening import EMBEDDED

    text, task = shlex.quote(name), task_of_name(name)
    if is_model_file(name):
        return UsageError(f"{name} is a file of a model: vitarium train RECIPE --model {text} --data DIR ({LISTED})")
    if name in EMBEDDED or Path(name).is_dir():
        what = "a data set" if name in EMBEDDED else "a folder"
        return UsageError(f"{name} is {what}, not a recipe: vitarium train pico --data {text} ({LISTED})")
    if task is not None:
        fitting = sorted(
            (row.name for row in recipe_rows() if row.task == task), key=lambda recipe: (recipe != "pico", "pico" not in recipe)
        )
        return UsageError(f"{name} is a model: vitarium train {fitting[0] if fitting else 'RECIPE'} --model {text} --data DIR ({LISTED})")
    return UsageError(f"no recipe {name!r}{nearest(name, list_recipes())} ({LISTED}; or give a path that ends in .yaml)")


def with_changes(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Return a recipe with changes, as for `load_recipe`, checked."""
    return _checked(recipe.model_dump(mode="json", by_alias=True, exclude_unset=True), overrides, "the recipe") if overrides else recipe


def _checked(values: Any, assignments: list[str], source: str) -> Recipe:
    if isinstance(values, dict):
        if any(a.strip().startswith("budget.") for a in assignments):
            values = {**values, "budget": {}}
        values = earlier_keys_moved(values)
        assignments = [f"objective.{a.strip()}" if re.match(rf"\s*({'|'.join(EARLIER_KEYS)})\s*[.=]", a) else a for a in assignments]
        chosen = [a.partition("=")[2].strip() for a in assignments if a.partition("=")[0].strip() == "objective.name"]
        if chosen and chosen[-1] != (values.get("objective") or {}).get("name", "classification"):
            values = {**values, "objective": {}}
        values = override(values, assignments)
    recipe = check(Recipe, values, source)
    recipe.settings_of(find_learner(recipe.objective["name"]))
    return recipe
