"""Learners by name. A file is imported only when its learner is asked for.

    @learner("repa", task="generate")
    class REPALearner(Learner): ...

A recipe names its learner and the learner's settings: `objective: {name: repa, coefficient: 0.5}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from vitarium.catalog.index import import_home, known_names, lacking
from vitarium.catalog.record import training_of
from vitarium.catalog.registry import find_model
from vitarium.errors import UsageError, nearest
from vitarium.training.base import Learner
from vitarium.training.settings import check

LearnerClass = TypeVar("LearnerClass", bound=type[Learner])

_LEARNERS: dict[str, type[Learner]] = {}


def learner(name: str, *, task: str = "pretrain") -> Callable[[LearnerClass], LearnerClass]:
    """Register a learner under the slug of its system, or under a name of its own (an objective that is no system's).

    Args:
        name: what a recipe's objective calls it.
        task: of the models that it trains, with options, as "classify" or "segment:kind=semantic".
    """

    def register(cls: LearnerClass) -> LearnerClass:
        cls.objective, cls.task_name = name, task
        _LEARNERS[name] = cls
        return cls

    return register


def find_learner(name: str) -> type[Learner]:
    """The learner of an objective. Imports only the file that the name points to.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    if name not in _LEARNERS:
        import_home("learners", name)
    if name not in _LEARNERS:
        known = list_learners()
        raise UsageError(f"unknown objective {name!r}{lacking(name) or nearest(name, known)} (objectives: {', '.join(known)})")
    return _LEARNERS[name]


def learner_class_of(model: nn.Module) -> tuple[type[Learner], Any]:
    """Return the learner's class and settings of a model: those that it was trained by, else its family's, else classification."""
    trained = training_of(model).learner
    cls = find_learner(trained.name if trained else family_learner(model))
    return cls, check(cls.Settings, trained.settings if trained else {}, f"settings of {cls.objective}")


def learner_of(model: nn.Module) -> Learner:
    """Return the learner that measures a model (see `learner_class_of`)."""
    cls, settings = learner_class_of(model)
    return cls(model, settings)


def family_learner(model: nn.Module) -> str:
    """The objective of the family that a model is of."""
    name = getattr(getattr(model, "spec", None), "name", "")
    return "classification" if not name or name.startswith(("timm/", "hf/")) else find_model(name)[0].learner


def list_learners() -> list[str]:
    """Return the names of all learners. Imports none of them."""
    return known_names("learners", _LEARNERS)
