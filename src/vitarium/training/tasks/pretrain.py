"""Pretraining of features; there is no prediction for a single image."""

from __future__ import annotations

from vitarium.training.tasks.base import Task
from vitarium.training.tasks.registry import task


@task("pretrain")
class Pretrain(Task):
    """Learn features without labels. The loss is the only metric; features are evaluated by a probe."""

    data_kind = "image"
    usage = "vitarium probe {file} --data DATA"
    no_answer = "measure its features with 'vitarium probe', or train a head on them"
