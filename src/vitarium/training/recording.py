"""The training record of a model (see `vitarium.catalog.record`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from vitarium.catalog.record import DataRecord, LearnerRecord, Results, RunRecord, Training, training_of
from vitarium.texts import encodable
from vitarium.training.fingerprints import fingerprint_images
from vitarium.training.identity import earlier_fingerprint, fingerprint

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.base import Learner


def record_training(learner: Learner, data: ImageData, *, source: str | None = None, seed: int = 0, val_fraction: float = 0.2) -> Training:
    """Record in `learner.eval_model()` its task, its learner and its data, so that a saved file contains them.

    Args:
        learner: after training.
        data: its training data.
        source: as it was given to `open_data`; None: the data's name.
        seed, val_fraction: of the split.
    """
    record = training_of(learner.eval_model())
    record.task = learner.task.record()
    if learner.objective:
        record.learner = LearnerRecord(name=learner.objective, settings=learner.settings.model_dump(mode="json", exclude_unset=True))
    digest = digest_of(data)
    before = record.data
    known = before.images if before is not None and before.fingerprint == digest else None  # `fit` has recorded this training already
    images = known or fingerprint_images(data.train)
    where: dict[str, Any] = {"source": encodable(source or data.name), "name": data.name, "seed": seed, "val_fraction": val_fraction}
    where["held_out"] = None if data.drawn is None else "random" if data.drawn else data.part
    record.data = DataRecord(**where, fingerprint=digest, images=images)
    return record


def digest_of(data: ImageData, *, earlier: bool = False) -> str:
    """Return the digest of classes, targets and sample names of both parts that a record holds.

    Args:
        earlier: as in version 0.1.0, with the data's name and the names as they are spelled.
    """
    values = earlier_fingerprint(data) if earlier else fingerprint(data)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def record_run(model: nn.Module, recipe: dict[str, Any], steps: int) -> None:
    """Record the run of a training.

    Args:
        model: trained.
        recipe: plain values of its settings.
        steps: optimizer steps.
    """
    training_of(model).run = RunRecord(recipe=recipe, steps=steps)


def record_results(model: nn.Module, metrics: Mapping[str, Any], data: ImageData) -> Results:
    """Record metrics of the held-out part of data, and return the record.

    Args:
        model: that was measured, with its methods.
        metrics: by name; only finite numbers are kept.
        data: whose `val` was measured.
    """
    numbers = {name: float(v) for name, v in metrics.items() if isinstance(v, float | int) and math.isfinite(v)}
    methods = [report.method.slug for report in getattr(model, "methods", [])]
    results = Results(metrics=numbers, images=len(data.val), part=data.part, methods=methods)
    training_of(model).results = results
    return results
