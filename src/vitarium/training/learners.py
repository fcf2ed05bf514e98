"""Registry of learners by name. A file is imported only when its learner is used.

    @learner("repa", task="generate")
    class REPALearner(Learner): ...

A recipe names its learner and the learner's settings: `objective: {name: repa, coefficient: 0.5}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from vitarium.catalog.classes import Classes
from vitarium.catalog.record import training_of
from vitarium.catalog.registry import find_model
from vitarium.errors import UsageError
from vitarium.training.base import Learner
from vitarium.training.settings import check

LearnerClass = TypeVar("LearnerClass", bound=type[Learner])

LEARNERS: Classes[Learner] = Classes("learners", "objective")


def learner(name: str, *, task: str = "pretrain") -> Callable[[LearnerClass], LearnerClass]:
    """Register a learner under the slug of its system, or under another name if it belongs to no system.

    Args:
        name: its name in a recipe's objective.
        task: task of the models that it trains, with options, such as "classify" or "segment:kind=semantic".
    """

    def prepare(cls: type[Learner]) -> None:
        cls.objective, cls.task_name = name, task

    return LEARNERS.register(name, prepare)


def find_learner(name: str) -> type[Learner]:
    """Return the class of a learner. Imports only its file.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    return LEARNERS.find(name)


def learner_class_of(model: nn.Module) -> tuple[type[Learner], Any]:
    """Return the learner's class and settings for a model: those of its training, else of its family, else classification."""
    trained = training_of(model).learner
    cls = find_learner(trained.name if trained else family_learner(model))
    return cls, check(cls.Settings, trained.settings if trained else {}, f"settings of {cls.objective}")


def learner_of(model: nn.Module) -> Learner:
    """Return the learner that evaluates a model (see `learner_class_of`)."""
    cls, settings = learner_class_of(model)
    return cls(model, settings)


def family_learner(model: nn.Module) -> str:
    """Return the learner's name of a model's family."""
    name = getattr(getattr(model, "spec", None), "name", "")
    return "classification" if not name or name.startswith(("timm/", "hf/")) else find_model(name)[0].learner


def check_suits(kind: type[Learner], name: str, model: nn.Module | None = None) -> None:
    """Refuse a model for another task than a learner's, where the forms of their models differ.

    Args:
        kind: the learner.
        name: of the model, whose family decides.
        model: a model that exists already; its own task decides.

    Raises:
        UsageError: it names both tasks.
    """
    if model is not None:
        own, settings = learner_class_of(model)
    else:
        foreign = name.startswith(("timm/", "hf/"))
        own = find_learner("classification" if foreign else find_model(name.partition(".")[0])[0].learner)
        settings = own.Settings()
    theirs, wanted = own.task_for(settings), kind.task_for(kind.Settings())
    if theirs.name != wanted.name and (theirs.own_models or wanted.own_models):
        raise UsageError(
            f"{name} is a model for the task {theirs.name}, and the learner {kind.objective} trains models for {wanted.name}; "
            f"choose another model, or a recipe for {theirs.name} ('vitarium models' lists the models by room)"
        )


def list_learners() -> list[str]:
    """Return the names of all learners. Imports none of them."""
    return LEARNERS.names()
