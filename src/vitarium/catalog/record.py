"""The record of a model: what a saved file says about it beside its tensors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

FORMAT = 3
"""Version of the record in a file. Raised when older versions of vitarium cannot read the file: 1 whole models, 2 files without base
weights, 3 task, learner, data and temperature."""


class LearnerRecord(BaseModel):
    """The learner that trained a model.

    Attributes:
        name: of the learner.
        settings: its settings, as a recipe gives them.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    settings: dict[str, Any] = {}


class DataRecord(BaseModel):
    """The data that a model was trained on.

    Attributes:
        source: as it was given to `open_data`.
        name: of the data.
        seed, val_fraction: of the split.
        fingerprint: digest of names, classes, targets and sample names of both parts.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    name: str
    seed: int = 0
    val_fraction: float = 0.2
    fingerprint: str = ""


class Base(BaseModel):
    """The weights that a file leaves out.

    Attributes:
        weights_from: a path, "hf:OWNER/NAME", an address, or "pretrained:TAG" for the published weights of the model's name.
        sha256: fingerprint of the tensors that are left out, in the dtypes that the model had.
    """

    model_config = ConfigDict(extra="forbid")

    weights_from: str
    sha256: str


class Training(BaseModel):
    """Task, learner and data of a model's training. It is `model.training_record`, and part of a saved file's record.

    Attributes:
        task: name and options of its task (`Task.record`); None: that of its learner or family.
        learner: None: its family's.
        data: None: unknown.
        temperature: by which logits are divided before the softmax, where the model was calibrated.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    task: dict[str, Any] | None = None
    learner: LearnerRecord | None = None
    data: DataRecord | None = None
    temperature: float | None = None


class Record(BaseModel):
    """The header of a saved file.

    Attributes:
        vitarium: version that wrote the file.
        format: see `FORMAT`.
        name, arguments: what `create_model(name, **arguments)` is called with.
        preprocessing: fields of `Preprocessing`.
        labels: names of the classes.
        methods: the methods applied by `vitarium.apply`, in order: {"slug", "options"}, and "state" if the method computed one.
        tied: name of a tensor that shares its memory -> the name under which it is stored.
        library: other library that the model comes from, such as "timm 1.0.31"; "" for ours.
        config: transformers' own configuration, for hf/ models.
        untrained: parameters of a head that no weights filled and no training changed (see `heads`).
        base: weights that the file leaves out; None: it is complete.
        task, learner, data, temperature: see `Training`.
        objective: formats 1 and 2 only: the learner's name and settings in one table.
    """

    model_config = ConfigDict(extra="forbid")

    vitarium: str
    format: int
    name: str
    arguments: dict[str, Any]
    preprocessing: dict[str, Any] | None
    labels: list[str] | None
    task: dict[str, Any] | None = None
    learner: LearnerRecord | None = None
    data: DataRecord | None = None
    temperature: float | None = None
    methods: list[dict[str, Any]] = []
    tied: dict[str, str] = {}
    library: str = ""
    config: dict[str, Any] | None = None
    untrained: list[str] = []
    base: Base | None = None
    objective: dict[str, Any] | None = None

    def training(self) -> Training:
        """Return the task of the model."""
        learner = self.learner
        if learner is None and self.objective is not None:
            settings = dict(self.objective)
            learner = LearnerRecord(name=str(settings.pop("name")), settings=settings)
        return Training(task=self.task, learner=learner, data=self.data, temperature=self.temperature)


def training_of(model: nn.Module) -> Training:
    """Return the training record of a model: always the same, mutable object. An empty one is created if there is none."""
    found = getattr(model, "training_record", None)
    if not isinstance(found, Training):
        found = Training()
        model.training_record = found  # type: ignore[assignment]
    return found
