"""Which training objectives exist: learners registered by name, imported only when asked for.

    @learner("repa")
    class REPALearner(Learner): ...

A recipe says which one it is for, with its settings: `objective: {name: repa, coefficient: 0.5}`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from vitarium.catalog.registry import find_model, import_system, system_module
from vitarium.catalog.systems import systems
from vitarium.errors import UsageError, nearest
from vitarium.training.base import Learner
from vitarium.training.settings import check

LearnerClass = TypeVar("LearnerClass", bound=type[Learner])

HOMES = {
    "classification": "vitarium.training.classification",
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


def learner(name: str) -> Callable[[LearnerClass], LearnerClass]:
    """Register a learner under the slug of its system, or under a name that has a row in `HOMES`."""

    def register(cls: LearnerClass) -> LearnerClass:
        cls.objective = name
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


def learner_of(model: nn.Module) -> Learner:
    """The learner that evaluates a model and predicts with it: of the objective that it was trained for (`model.objective`), else of its
    family's, else classification."""
    objective = dict(getattr(model, "objective", None) or {"name": family_learner(model)})
    cls = find_learner(objective.pop("name"))
    return cls(model, check(cls.Settings, objective, f"settings of {cls.objective}"))


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
