"""Results of a comparison as plain values: one `Trial` a model, and the `Comparison` that holds them, written as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vitarium.files import write_json, write_text
from vitarium.reports.curves import still_improving
from vitarium.reports.inspection import Inspection
from vitarium.reports.names import may_start_better
from vitarium.reports.recommend import Baseline, Recommendation, recommend, standard_error
from vitarium.training.tasks import Metric, Task, parse_task
from vitarium.training.tasks.classify import ACCURACY

COSTS = ("latency_ms", "throughput", "peak_memory_mb", "params", "macs", "image_size", "steps", "seconds")
"""Columns of a table of the results, behind the name and the primary metric."""
USUAL_SIDE = 224
"""Side of the input of most published models, pixels; a larger one is not suggested."""
CONSTANT = "constant answer"
RUNTIME_COSTS = ("runtime_latency_ms", "runtime_throughput")
"""Further columns, where a runtime was asked for."""
BUSY = 0.15
"""Share of the processor for other programs from which timings are disturbed."""


@dataclass(frozen=True)
class Trial:
    """One model, trained, evaluated and measured.

    Args:
        name: as given to `create_model`.
        score: value of `metric` on the held-out images.
        metrics: all numbers that its task measures on the held-out images; those that are not finite are left out.
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
        bad_files: {"path", "reason"} of each image that could not be read.
        file: the trained model's file, relative to the comparison's folder.
        threads: of PyTorch, while it was trained and timed.
        device: name of the processor or accelerator that it was trained and timed on.
        metric: the primary metric.
        runtime: what executed the model for the next two, such as "onnxruntime"; "eager": nothing else was asked for.
        runtime_latency_ms, runtime_throughput: as latency_ms and throughput, with this runtime; None where it does not take the model.
        runtime_refusal: the reason why not; "" else.
        load: share of the processor time of the cores that other programs used while it was timed, 0 to 1; 0 where the system does not
            count it.
        inputs: names of the arguments of the call that was timed; one, if the model is called with an image.
        extras: what its task keeps beside the metrics, plain values (see `Task.extras`).
    """

    name: str
    score: float
    metrics: dict[str, float] = field(repr=False)
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
    bad_files: list[dict[str, str]] = field(repr=False)
    file: str
    threads: int = 1
    device: str = ""
    load: float = 0.0
    runtime: str = "eager"
    runtime_latency_ms: float | None = None
    runtime_throughput: float | None = None
    runtime_refusal: str = ""
    metric: Metric = ACCURACY
    inputs: list[str] = field(default_factory=list, repr=False)
    extras: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the score, from the number of held-out images; None where it is not known."""
        return standard_error(self.score, self.evaluated) if self.metric.share_of_images else None

    @property
    def disturbed(self) -> bool:
        """True if other programs used much of the processor when the model was timed, so that it looks slower than it is."""
        return self.load > BUSY

    @property
    def still_improving(self) -> float | None:
        """Gain of the metric over the last third of the learning curve, if it had not flattened (see `curves`); None else."""
        return still_improving(self.history, self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; metrics and extras stand under their own names too, beside the fields."""
        own = {name: value for name, value in asdict(self).items() if name != "extras"}
        return {**self.metrics, **self.extras, **own}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """Make a trial from the values of `to_dict`, or from those of a version that compared classifiers only."""
        known = {field.name for field in fields(cls)}
        own = {name: value for name, value in values.items() if name in known}
        rest = {name: value for name, value in values.items() if name not in known}
        if "score" not in own:
            own |= {"score": rest["accuracy"], "metrics": {name: rest[name] for name in ("accuracy", "loss")}}
        own["metric"] = Metric(**own["metric"]) if "metric" in own else ACCURACY
        return cls(**own, extras={name: value for name, value in rest.items() if name not in own["metrics"]})


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
        classes: names of the data's classes or labels; none where it has none.
        budget: of each model, such as {"steps": 300}.
        settings: what else was the same for all: recipe, batch size, seed, engine, ...
        machine: where `compare` was called.
        created: ISO 8601 time.
        trials: the finished models, in the order asked for; at least one.
        failures: the others.
        task: record of the task, see `Task.record`.
        baseline: scores of the best constant answer on the held-out images; {} where there is none.
        notes: what was left out, ignored or assumed when the data was opened, a sentence each.
        inspection: what is known about the data.
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
    task: dict[str, Any] = field(default_factory=lambda: {"name": "classify"})
    baseline: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    inspection: Inspection = field(default_factory=Inspection, repr=False)

    @property
    def metric(self) -> Metric:
        """Primary metric, by which the models are compared."""
        return self.trials[0].metric

    @property
    def best(self) -> Trial:
        """Model with the best score; among equals the one with the lowest latency."""
        return min(self.trials, key=self._order)

    def _order(self, trial: Trial) -> tuple[float, float]:
        return self.metric.rank(trial.score), trial.latency_ms

    @property
    def recommendation(self) -> Recommendation:
        """Model to use, and why; by the latency of the runtime that was asked for, where it takes every model."""
        deployed = [replace(t, latency_ms=t.runtime_latency_ms) for t in self.trials if t.runtime_latency_ms is not None]
        models = deployed if len(deployed) == len(self.trials) else self.trials
        published = not self.settings.get("pretrained") and may_start_better([trial.name for trial in self.trials])
        return recommend(models, self.metric, baselines_of(self), published=published)

    @property
    def runtime(self) -> str:
        """Name of the runtime that the models were timed with beside PyTorch; "eager" for none."""
        return self.trials[0].runtime

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `table`: name, primary metric, costs; at the end those of a runtime."""
        return ("name", self.metric.name, *COSTS, *(RUNTIME_COSTS if self.runtime != "eager" else ()))

    def parsed_task(self) -> Task:
        """Return the task.

        Raises:
            UsageError: it belongs to a package that is not installed.
        """
        return parse_task(self.task)

    @property
    def report(self) -> Path:
        """Path of the HTML page."""
        return self.folder / "report.html"

    @property
    def bad_files(self) -> list[dict[str, str]]:
        """Each image that could not be read, once."""
        return list({bad["path"]: bad for trial in self.trials for bad in trial.bad_files}.values())

    def baselines(self) -> dict[str, float]:
        """Return the scores of answers that no model gives, by name: the best constant one, and those of `inspection`."""
        metric = self.metric.name
        constant = {CONSTANT: self.baseline[metric]} if metric in self.baseline else {}
        return constant | {row["name"]: row[metric] for row in self.inspection.baselines if metric in row}

    @property
    def warnings(self) -> list[str]:
        """Sentences on what speaks against the numbers: images that the input reduces, duplicates, rising curves, other load."""
        return warnings_of(self)

    def table(self) -> list[dict[str, Any]]:
        """Return a row a finished model, the best first; keys are `columns`, values plain numbers."""
        rows = sorted(self.trials, key=self._order)
        columns = self.columns[2:]
        return [{"name": trial.name, self.metric.name: trial.score, **{c: getattr(trial, c) for c in columns}} for trial in rows]

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
            "task": self.task,
            "metric": asdict(self.metric),
            "baseline": self.baseline,
            "best": self.best.name,
            "recommended": self.recommendation.model,
            "recommendation": self.recommendation.sentence,
            "bad_files": self.bad_files,
            "notes": self.notes,
            "warnings": self.warnings,
            "inspection": self.inspection.to_dict(),
            "failed": [asdict(failure) for failure in self.failures],
            "models": [trial.to_dict() for trial in self.trials],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: Path) -> Comparison:
        """Make a comparison from the content of a results.json of `folder`."""
        rest = {key: values[key] for key in ("data", "images", "classes", "budget", "settings", "machine", "created")}
        trials, failures = [Trial.from_dict(row) for row in values["models"]], [Failure(**row) for row in values["failed"]]
        later: dict[str, Any] = {key: values[key] for key in ("task", "baseline", "notes") if key in values}
        later |= {"inspection": Inspection.from_dict(values["inspection"])} if "inspection" in values else {}
        return cls(folder=folder, **rest, trials=trials, failures=failures, **later)

    def write(self) -> None:
        """Write results.json and results.csv atomically."""
        write_json(self.folder / "results.json", self.to_dict())
        text = io.StringIO()
        writer = csv.DictWriter(text, [*self.columns, "error"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.table())
        writer.writerows({"name": failure.name, "error": failure.error} for failure in self.failures)
        write_text(self.folder / "results.csv", text.getvalue())


def baselines_of(comparison: Comparison) -> list[Baseline]:
    """Return the answers that no model gives, with the numbers of held-out images they were measured on."""
    metric, images = comparison.metric.name, comparison.images["val"]
    measured = {row["name"]: int(row.get("val", images)) for row in comparison.inspection.baselines if metric in row}
    named = lambda name: f"the {name}" if name == CONSTANT else name
    return [Baseline(named(name), score, measured.get(name, images)) for name, score in comparison.baselines().items()]


def warnings_of(comparison: Comparison) -> list[str]:
    """Return the sentences of `Comparison.warnings`."""
    found = _small_input(comparison) + comparison.inspection.duplicates.sentences()
    if rising := [trial for trial in comparison.trials if trial.still_improving is not None]:
        ((unit, amount),) = comparison.budget.items()
        names = ", ".join(trial.name for trial in rising)
        longer = f"train longer, for example with --{unit} {2 * amount:g} (now {amount:g})"
        found.append(f"still improving when the training ended: {names}; {longer}")
    found += [f"no timing of {t.name} with {t.runtime}: {t.runtime_refusal}" for t in comparison.trials if t.runtime_refusal]
    if late := [trial for trial in comparison.trials if trial.disturbed]:
        which = "the models" if len(late) == len(comparison.trials) else ", ".join(trial.name for trial in late)
        most = max(trial.load for trial in late)
        found.append(
            f"other programs used up to {100 * most:.0f} % of the processor while {which} were timed: they look slower than they are"
        )
    return found


def _small_input(comparison: Comparison) -> list[str]:
    median = comparison.inspection.sizes.get("median")
    reduced = [trial for trial in comparison.trials if median and trial.image_size < min(median)]
    if not median or not reduced:
        return []
    which = "the models see" if len(reduced) == len(comparison.trials) else f"some models ({', '.join(t.name for t in reduced)}) see"
    return [input_sentence(which, sorted({trial.image_size for trial in reduced}), median)]


def larger_input(median: Sequence[int]) -> int:
    """Return the side of a usual input for images of a median width and height, pixels."""
    return min(min(median), USUAL_SIDE) // 32 * 32


def input_sentence(which: str, sides: Sequence[int], median: Sequence[int]) -> str:
    """Return the sentence on models whose input is smaller than the images.

    Args:
        which: the models, with the verb: "the models see".
        sides: of their inputs, pixels.
        median: width and height of the images, pixels.
    """
    pixels = " or ".join(f"{side}x{side}" for side in sides)
    larger = larger_input(median)
    advice = f"a larger input (--image-size {larger}) costs time and may score better" if larger > max(sides) else "small details are lost"
    return f"{which} {pixels} pixels, and the images have {median[0]}x{median[1]} (median): {advice}"
