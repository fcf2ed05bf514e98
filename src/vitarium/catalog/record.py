"""The record of a model: what a saved file says about it beside its tensors. One pydantic model reads and checks all of it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from vitarium.catalog.classes import known_names
from vitarium.catalog.index import Registry
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.errors import CheckpointError, UsageError, nearest
from vitarium.version import __version__

FORMAT = 5
"""Version of the record in a file. Raised when older versions of vitarium cannot read the file: 1 whole models, 2 files without base
weights, 3 task, learner, data and temperature, 4 run and results, 5 the way in which the held-out part was chosen."""
LONGEST_RECORD = 2**24
"""Largest record in characters."""
DEEPEST = 16
"""Largest depth of nested lists and tables."""


# ---- field types


def is_plain(value: Any, depth: int = DEEPEST) -> bool:
    """Return whether a value can stand in a record: a finite number, text, bool, None, or a list or table of these."""
    if depth == 0:
        return False
    if isinstance(value, list | tuple):
        return all(is_plain(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v, depth - 1) for k, v in value.items())
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _plain_table(value: dict[str, Any]) -> dict[str, Any]:
    if not is_plain(value):
        raise ValueError(f"must hold finite numbers, text, true, false, null, and lists and tables of these, at most {DEEPEST} deep")
    return value


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _preparation(value: dict[str, Any]) -> dict[str, Any]:
    fields = list(Preprocessing.__dataclass_fields__)
    if unknown := [key for key in value if key not in fields]:
        raise ValueError(f"has no field {unknown[0]!r}{nearest(unknown[0], fields)} (it has {', '.join(fields)})")
    Preprocessing(**value)
    return value


def _check_known(registry: Registry, word: str, name: str) -> str:
    """Return a name that is registered, in the index or by the user's own code; raises ValueError for another one."""
    known = known_names(registry)
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(f"{name!r} is no {word} of this installation{hint}; if your own code registers it, import that first")
    return name


Table = Annotated[dict[str, Any], AfterValidator(_plain_table)]
"""A table of plain values."""
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Words = Annotated[str, BeforeValidator(_encodable), Field(max_length=10_000)]
"""Text; bytes of a file name that are not UTF-8 are escaped, because JSON cannot hold them."""


def _task(value: dict[str, Any]) -> dict[str, Any]:
    name = value.get("name")
    if not isinstance(name, str):
        raise ValueError(f"must hold the name of a task, got {name!r}")
    _check_known("tasks", "task", TASK_ALIASES.get(name, {}).get("name", name))
    return value


TASK_ALIASES: dict[str, dict[str, Any]] = {
    "class": {"name": "classify"},
    "classification": {"name": "classify"},
    "panoptic": {"name": "segment", "kind": "panoptic"},
    "semantic": {"name": "segment", "kind": "semantic"},
    "instance": {"name": "segment", "kind": "instance"},
    "pairs": {"name": "restore"},
    "restoration": {"name": "restore"},
    "retrieval": {"name": "retrieve"},
    "features": {"name": "encode"},
}
"""Accepted aliases of tasks, such as names in earlier versions."""
TaskTable = Annotated[Table, AfterValidator(_task)]


# ---- parts


class Part(BaseModel):
    """Base of the parts of a record: no further keys, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)


class LearnerRecord(Part):
    """The learner that trained a model.

    Attributes:
        name: of the learner.
        settings: its settings, as a recipe gives them.
    """

    name: Annotated[Name, AfterValidator(functools.partial(_check_known, "learners", "learner"))]
    settings: Table = {}


class ImagesRecord(Part):
    """A fingerprint of training images (see `vitarium.training.fingerprints`).

    Attributes:
        count: number of training images.
        below: hashes of names up to this number were taken; None: all images were.
        digests: the sorted digests of the images that were taken, 6 bytes each, in base64.
    """

    count: int = Field(ge=0)
    below: int | None = Field(default=None, ge=0)
    digests: str = Field(max_length=100_000, pattern=r"^[A-Za-z0-9+/]*={0,2}$")


class DataRecord(Part):
    """The data that a model was trained on.

    Attributes:
        source: as it was given to `open_data`.
        name: of the data.
        seed, val_fraction: of the split, where the held-out part was drawn at random.
        held_out: "random", or the part of the data that was held out, such as "test"; None: unknown (files of earlier versions).
        fingerprint: digest of names, classes, targets and sample names of both parts.
        images: fingerprint of the images of the training part; None: unknown (files of earlier versions).
    """

    source: Words
    name: Words
    seed: int = 0
    val_fraction: float = Field(default=0.2, ge=0, le=1)
    held_out: Words | None = None
    fingerprint: Words = ""
    images: ImagesRecord | None = None


class Base(Part):
    """The weights that a file leaves out.

    Attributes:
        weights_from: a path, "hf:OWNER/NAME", an address, or "pretrained:TAG" for the published weights of the model's name.
        sha256: fingerprint of the tensors that are left out, in the dtypes that the model had.
    """

    weights_from: Annotated[str, Field(min_length=1, max_length=10_000)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MethodRecord(Part):
    """A method that is applied to a model.

    Attributes:
        slug: of the method.
        options: its options.
        state: plain values that it found while it was attached; {} if none.
    """

    slug: Name
    options: Table = {}
    state: Table = {}


class RunRecord(Part):
    """The training run.

    Attributes:
        recipe: the settings that were given, as in a recipe's file.
        steps: optimizer steps. Times are not recorded: equal runs make equal files.
    """

    recipe: Table = {}
    steps: int = Field(ge=0)


class Results(Part):
    """Numbers that were measured on held-out images.

    Attributes:
        metrics: of the task; numbers that are not finite are left out.
        images: number of images.
        part: of the data: "val" or "test".
        methods: slugs of the methods that the model had when it was measured.
    """

    metrics: dict[Name, float]
    images: int = Field(ge=0)
    part: Words = "val"
    methods: list[Name] = []


class CalibrationRecord(Part):
    """The effect of a temperature on the probabilities, on held-out images that it was not fitted on.

    Attributes:
        fitted, measured: numbers of images of the fit, and of the others, on which the rest was measured.
        error_before, error_after: expected calibration error, 0 to 1, with temperature 1 and with the fitted one.
        loss_before, loss_after: mean cross entropy in nats, likewise.
    """

    fitted: int = Field(ge=0)
    measured: int = Field(ge=0)
    error_before: float = Field(ge=0)
    error_after: float = Field(ge=0)
    loss_before: float = Field(ge=0)
    loss_after: float = Field(ge=0)


class Training(Part):
    """Task, learner and data of a model's training. It is `model.training_record`, and part of a saved file's record.

    Attributes:
        task: name and options of its task (`Task.record`); None: that of its learner or family.
        learner: None: its family's.
        data: None: unknown.
        temperature: by which logits are divided before the softmax, where the model was calibrated (see `catalog.calibration`). Methods
            keep it, because they approximate the same logits; training drops it.
        calibration: what the temperature did when it was fitted; None: unknown, or no temperature.
        run: None: unknown.
        results: None: nothing was measured.
    """

    task: TaskTable | None = None
    learner: LearnerRecord | None = None
    data: DataRecord | None = None
    temperature: float | None = Field(default=None, gt=0)
    calibration: CalibrationRecord | None = None
    run: RunRecord | None = None
    results: Results | None = None


class ModelRecord(Part):
    """Description from which a model is built again, without its weights.

    Attributes:
        name, arguments: what `create_model(name, **arguments)` is called with.
        preprocessing: fields of `Preprocessing`; None: that of the model's name.
        labels: names of the classes.
        methods: the methods applied by `vitarium.apply`, in order.
        config: transformers' own configuration, for hf/ models.
    """

    name: Name
    arguments: Table = {}
    preprocessing: Annotated[Table, AfterValidator(_preparation)] | None = None
    labels: list[Words] | None = None
    methods: list[MethodRecord] = []
    config: Table | None = None

    @model_validator(mode="after")
    def _config_of_hf(self) -> ModelRecord:
        if (self.config is not None) != self.name.startswith("hf/"):
            raise ValueError(f"config is transformers' and belongs to hf/ models alone, all of which have one; the model is {self.name}")
        return self

    def saved_methods(self) -> list[dict[str, Any]]:
        """Return the methods as `rebuild_methods` takes them."""
        return [method.model_dump() for method in self.methods]


class Record(ModelRecord):
    """The header of a saved file.

    Attributes:
        vitarium: version that wrote the file.
        format: see `FORMAT`.
        tied: name of a tensor that shares its memory -> the name under which it is stored.
        library: other library that the model comes from, such as "timm 1.0.31"; "" for ours.
        untrained: parameters of a head that no weights filled and no training changed (see `heads`).
        base: weights that the file leaves out; None: it is complete.
        task, learner, data, temperature, calibration, run, results: see `Training`.
        objective: formats 1 and 2 only: the learner's name and settings in one table.
    """

    vitarium: Name
    format: int = Field(ge=1, le=FORMAT)
    task: TaskTable | None = None
    learner: LearnerRecord | None = None
    data: DataRecord | None = None
    temperature: float | None = Field(default=None, gt=0)
    calibration: CalibrationRecord | None = None
    run: RunRecord | None = None
    results: Results | None = None
    tied: dict[str, str] = {}
    library: Words = ""
    untrained: list[Name] = []
    base: Base | None = None
    objective: Table | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if self.objective is not None:
            if self.format >= 3:
                raise ValueError("objective is a field of formats 1 and 2")
            _check_objective(self.objective)
        if loops := [name for name, stored in self.tied.items() if stored in self.tied]:
            raise ValueError(f"tied: {loops[0]!r} is tied to {self.tied[loops[0]]!r}, which is not stored")
        return self

    def training(self) -> Training:
        """Return the task of the model."""
        learner = self.learner
        if learner is None and self.objective is not None:
            settings = dict(self.objective)
            learner = LearnerRecord(name=settings.pop("name"), settings=settings)
        kept = {name: getattr(self, name) for name in Training.model_fields if name != "learner"}
        return Training(learner=learner, **kept)


def _check_objective(objective: dict[str, Any]) -> None:
    name = objective.get("name")
    if not isinstance(name, str):
        raise ValueError(f"objective must hold the name of a learner, got {name!r}")
    try:
        _check_known("learners", "learner", name)
    except ValueError as error:
        raise ValueError(f"objective.name: {error}") from error


# ---- reading


def read_record(text: str, place: str) -> Record:
    """Read the record of a file.

    Args:
        text: JSON.
        place: the file, for messages.

    Raises:
        CheckpointError: it names the first fields that do not fit; or the record is in a newer format.
    """
    try:
        if len(text) > LONGEST_RECORD:
            raise UsageError(f"it has {len(text):,} characters, at most {LONGEST_RECORD:,} are read")
        _check_format(text, place)
        return Record.model_validate_json(text, strict=True)
    except ValidationError as error:
        wrong = "; ".join(problems(error))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        wrong = str(error)
    raise CheckpointError(f"{place} has a damaged record of its model: {wrong}; its tensors can be loaded with checkpoint={place!r}")


def _check_format(text: str, place: str) -> None:
    """Raise CheckpointError for a record of a newer format, whose further fields are not known here."""
    values = json.loads(text)
    version, writer = (values.get("format"), values.get("vitarium")) if isinstance(values, dict) else (None, None)
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{place} was written by vitarium {str(writer)[:40]} (format {version}); this is {__version__} (format {FORMAT}): "
            "pip install --upgrade vitarium"
        )


def problems(error: ValidationError, most: int = 3) -> Iterator[str]:
    """Yield "field: reason, got value" for the first errors of a record."""
    for row in error.errors(include_url=False)[:most]:
        field = ".".join(str(part) for part in row["loc"])
        cause = row.get("ctx", {}).get("error")
        reason = str(cause) if cause else row["msg"][:1].lower() + row["msg"][1:]
        got = "" if cause or row["type"] == "missing" else f", got {_short(row['input'])}"
        yield f"{field + ': ' if field else ''}{reason}{got}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def training_of(model: nn.Module) -> Training:
    """Return the training record of a model: always the same, mutable object. An empty one is created if there is none."""
    found = getattr(model, "training_record", None)
    if not isinstance(found, Training):
        found = Training()
        model.training_record = found  # type: ignore[assignment]
    return found
