"""The task of a model."""

from __future__ import annotations

from torch import nn

from vitarium.training.tasks.base import Task
from vitarium.training.tasks.registry import parse_task


def task_of(model: nn.Module) -> Task:
    """Return the task of a model: from its record, else from its learner or family, else classify.

    Raises:
        UsageError: the record names a task or learner that is not installed.
    """
    from vitarium.catalog.record import training_of
    from vitarium.training.learners import learner_class_of

    recorded = training_of(model).task
    if recorded is not None:
        return parse_task(recorded)
    cls, settings = learner_class_of(model)
    return cls.task_for(settings)
