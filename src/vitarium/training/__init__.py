"""Training: the loop, the base class of learners, recipes and the state of a run.

recipe = load_recipe("pico", ["budget.steps=500"])
data = open_data("digits")
learner = find_learner(recipe.objective["name"]).create("swin_pico", data, recipe)
result = fit(learner, data, recipe, "runs/mine")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitarium.training.base import Learner as Learner
    from vitarium.training.classification import ClassificationLearner as ClassificationLearner
    from vitarium.training.evaluation import evaluate as evaluate
    from vitarium.training.evaluation import predict_logits as predict_logits
    from vitarium.training.fitting import FitResult as FitResult
    from vitarium.training.fitting import fit as fit
    from vitarium.training.learners import find_learner as find_learner
    from vitarium.training.learners import learner as learner
    from vitarium.training.learners import list_learners as list_learners
    from vitarium.training.opening import list_recipes as list_recipes
    from vitarium.training.opening import load_recipe as load_recipe
    from vitarium.training.players import Player as Player
    from vitarium.training.progress import Progress as Progress
    from vitarium.training.recipe import Recipe as Recipe

_PLACES = {
    "ClassificationLearner": "classification",
    "FitResult": "fitting",
    "Learner": "base",
    "Player": "players",
    "Progress": "progress",
    "Recipe": "recipe",
    "evaluate": "evaluation",
    "find_learner": "learners",
    "fit": "fitting",
    "learner": "learners",
    "list_learners": "learners",
    "list_recipes": "opening",
    "load_recipe": "opening",
    "predict_logits": "evaluation",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
