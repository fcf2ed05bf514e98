"""Results of a comparison as plain values: one `Trial` a model, and the `Comparison` that holds them, written as JSON and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitarium.files import write_json, write_text
from vitarium.reports.recommend import Recommendation, recommend, standard_error

COLUMNS = ("name", "accuracy", "latency_ms", "throughput", "peak_memory_mb", "params", "macs", "image_size", "steps", "seconds")
"""Columns of a table of the results."""


@dataclass(frozen=True)
class Mistake:
    """A held-out image that the model classified wrongly."""

    index: int
    """Place in the held-out part."""
    image: str
    """Path or identifier."""
    true: int
    predicted: int
    confidence: float
    """Softmax probability of the predicted class, 0 to 1."""


@dataclass(frozen=True)
class Trial:
    """One model, trained, evaluated and measured.

    Args:
        name: as given to `create_model`.
        accuracy: share of the held-out images that it classifies correctly, 0 to 1.
        loss: mean cross-entropy on the held-out images.
        evaluated: number of held-out images that could be read.
        latency_ms: milliseconds for one image at batch 1.
        throughput: images a second at the comparison's batch for measuring.
        peak_memory_mb: weights, images and activations of a forward pass at that batch, 10^6 bytes.
        params: number of parameters.
        macs: multiply-accumulates for one image.
        bytes: size of the weights in memory.
        image_size: side of the model's input, pixels.
        steps: optimizer steps.
        seconds: time of training, of all attempts together.
        history: the learning curves, a dictionary of numbers a point, each with "step".
        confusion: rows true, columns predicted, counts.
        mistakes: the most confident ones, most confident first.
        bad_files: {"path", "reason"} of each image that could not be read.
        file: the trained model's file, relative to the comparison's folder.
        threads: of PyTorch, while it was trained and timed.
        device: name of the processor or accelerator that it was trained and timed on.
    """

    name: str
    accuracy: float
    loss: float
    evaluated: int
    latency_ms: float
    throughput: float
    peak_memory_mb: float
    params: int
    macs: int
    bytes: int
    image_size: int
    steps: int
    seconds: float
    history: list[dict[str, float]] = field(repr=False)
    confusion: list[list[int]] = field(repr=False)
    mistakes: list[Mistake] = field(repr=False)
    bad_files: list[dict[str, str]] = field(repr=False)
    file: str
    threads: int = 1
    device: str = ""

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, from the number of held-out images."""
        return standard_error(self.accuracy, self.evaluated)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """Make a trial from the values of `to_dict`."""
        return cls(**{**values, "mistakes": [Mistake(**m) for m in values["mistakes"]]})


@dataclass(frozen=True)
class Failure:
    """A model that could not be trained or measured, and why."""

    name: str
    error: str


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Args:
        folder: where everything was written.
        data: name of the data.
        images: number of images, {"train": ..., "val": ...}.
        classes: names of the classes, in the order of the logits.
        budget: of each model, such as {"steps": 300}.
        settings: what else was the same for all: recipe, batch size, seed, engine, ...
        machine: where `compare` was called.
        created: ISO 8601 time.
        trials: the finished models, in the order asked for; at least one.
        failures: the others.
    """

    folder: Path
    data: str
    images: dict[str, int]
    classes: list[str]
    budget: dict[str, Any]
    settings: dict[str, Any]
    machine: dict[str, Any]
    created: str
    trials: list[Trial]
    failures: list[Failure]

    @property
    def best(self) -> Trial:
        """Most accurate model; among equals the one with the lowest latency."""
        return min(self.trials, key=lambda t: (-t.accuracy, t.latency_ms))

    @property
    def recommendation(self) -> Recommendation:
        """Model to use, and why."""
        return recommend(self.trials)

    @property
    def report(self) -> Path:
        """Path of the HTML page."""
        return self.folder / "report.html"

    @property
    def bad_files(self) -> list[dict[str, str]]:
        """Each image that could not be read, once."""
        return list({bad["path"]: bad for trial in self.trials for bad in trial.bad_files}.values())

    def table(self) -> list[dict[str, Any]]:
        """Return a row a finished model, most accurate first; keys are `COLUMNS`, values plain numbers."""
        rows = sorted(self.trials, key=lambda t: (-t.accuracy, t.latency_ms))
        return [{column: getattr(trial, column) for column in COLUMNS} for trial in rows]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json: `models` holds the finished ones, `failed` the others."""
        return {
            "data": self.data,
            "images": self.images,
            "classes": self.classes,
            "budget": self.budget,
            "settings": self.settings,
            "machine": self.machine,
            "created": self.created,
            "best": self.best.name,
            "recommended": self.recommendation.model,
            "recommendation": self.recommendation.sentence,
            "bad_files": self.bad_files,
            "failed": [asdict(failure) for failure in self.failures],
            "models": [trial.to_dict() for trial in self.trials],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: Path) -> Comparison:
        """Make a comparison from the content of a results.json of `folder`."""
        rest = {key: values[key] for key in ("data", "images", "classes", "budget", "settings", "machine", "created")}
        trials, failures = [Trial.from_dict(row) for row in values["models"]], [Failure(**row) for row in values["failed"]]
        return cls(folder=folder, **rest, trials=trials, failures=failures)

    def write(self) -> None:
        """Write results.json and results.csv atomically."""
        write_json(self.folder / "results.json", self.to_dict())
        text = io.StringIO()
        writer = csv.DictWriter(text, [*COLUMNS, "error"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.table())
        writer.writerows({"name": failure.name, "error": failure.error} for failure in self.failures)
        write_text(self.folder / "results.csv", text.getvalue())
