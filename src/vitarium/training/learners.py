"""Learners by name. A file is imported only when its learner is asked for.

    @learner("repa", task="generate")
    class REPALearner(Learner): ...

A recipe names its learner and the learner's settings: `objective: {name: repa, coefficient: 0.5}`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from vitarium.catalog.record import training_of
from vitarium.catalog.registry import find_model, import_system, system_module
from vitarium.catalog.systems import systems
from vitarium.errors import UsageError, nearest
from vitarium.training.base import Learner
from vitarium.training.settings import check

LearnerClass = TypeVar("LearnerClass", bound=type[Learner])

HOMES = {
    "classification": "vitarium.training.classification",
    "dcgan": "vitarium.generation.adversarial.dcgan",
    "diffusion": "vitarium.generation.diffusion.learner",
    "distillation": "vitarium.training.distillation",
    "linear_probe": "vitarium.pretraining.probes",
    "mae": "vitarium.pretraining.masked_autoencoder",
    "multilabel": "vitarium.training.multilabel",
    "multilabel_probe": "vitarium.pretraining.probes",
    "restoration": "vitarium.generation.restoration.learner",
}
"""Objectives that are no system's own -> their module. A system's lie in the file of the system."""

_LEARNERS: dict[str, type[Learner]] = {}


def learner(name: str, *, task: str = "pretrain") -> Callable[[LearnerClass], LearnerClass]:
    """Register a learner under the slug of its system, or under a name that has a row in `HOMES`.

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
        if name in HOMES:
            importlib.import_module(HOMES[name])
        else:
            for system in systems():  # a system may have several: "var" and "var_tokenizer"
                if name == system.slug or name.startswith(system.slug + "_"):
                    import_system(system.slug)
    if name not in _LEARNERS:
        known = list_learners()
        raise UsageError(f"unknown objective {name!r}{nearest(name, known)} (objectives: {', '.join(known)})")
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
    """Names of all objectives."""
    for module in HOMES.values():
        importlib.import_module(module)
    for system in systems():
        import_system(system.slug)
    return sorted(_LEARNERS)


def learners_of_system(slug: str) -> list[str]:
    """The objectives that a system's file (or folder) registers."""
    module = system_module(slug)
    if module is None:
        return []
    importlib.import_module(module)
    return sorted(name for name, cls in _LEARNERS.items() if cls.__module__ == module or cls.__module__.startswith(module + "."))
