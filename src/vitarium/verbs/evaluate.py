"""Evaluate a trained model on labelled images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitarium.engine import Engine, as_engine
from vitarium.errors import DataError, UsageError
from vitarium.files import is_model_file
from vitarium.training.tasks.base import TableData, Task
from vitarium.verbs.opening import Notify, apply_methods, execute, name_of, open_model, open_to_evaluate, quiet
from vitarium.verbs.result import Result, kept

if TYPE_CHECKING:
    from torch import nn

    from vitarium.catalog.record import Training
    from vitarium.data import ImageData, ImageSet
    from vitarium.training.calibration import Calibration
    from vitarium.training.fingerprints import Seen


MOST_TRAINED = 0.1
"""Largest share of images of the training among those of a calibration."""


@dataclass(repr=False)
class Evaluation(Result):
    """The metrics of a model on a part of a data set.

    Attributes:
        model: file or name.
        data: name of the data.
        split: "val", "test", "train" or "all".
        images: number of evaluated images.
        metrics: metrics by name: numbers or lists. Rates are in [0, 1]. Beside a fit of the temperature, loss and calibration_error are of
            the other half of the images, on which it was not fitted.
        broken: {"path", "reason"} of images that could not be read.
        corruptions: errors under corruptions, if requested.
        task: the model's task.
        notes: what was left out, ignored or assumed when the data was opened.
        trained: how many of the evaluated images the model was trained on; None: its file does not say.
        temperature: of the model's calibration; None: it is not calibrated.
        calibration: the fit of the temperature, if requested.
        kept_card: the card beside the file, if it has been edited by its user and so lacks a calibration that was changed; None otherwise.
    """

    model: str
    data: str
    split: str
    images: int
    metrics: dict[str, Any]
    broken: list[dict[str, str]]
    task: Task = field(repr=False)
    corruptions: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    trained: Seen | None = None
    temperature: float | None = None
    calibration: Calibration | None = None
    kept_card: Path | None = None

    def facts(self) -> dict[str, Any]:
        known = {} if self.trained is None else {"trained on": f"{self.trained} images"}
        fit = self.calibration
        where = f", fitted on {fit.fitted} of the images (loss and calibration error: the other {fit.measured})" if fit else ""
        scaled = {} if self.temperature is None else {"temperature": f"{self.temperature:.3f}{where}"}
        return {"images": f"{self.images} ({self.data}, {self.split})", **known, **self.task.texts(self.metrics), **scaled}

    def tables(self) -> list[TableData]:
        fitted = [calibration_table(self.calibration)] if self.calibration else []
        corrupted = [corruption_table(self.corruptions)] if self.corruptions else []
        return [*self.task.tables(self.metrics), *fitted, *corrupted]

    def to_dict(self) -> dict[str, Any]:
        report = {"model": self.model, "task": self.task.name, "data": self.data, "split": self.split, **self.metrics}
        report |= {"images": self.images, "broken": self.broken, "notes": list(self.notes)}
        report |= {"trained_on": self.trained and {"images": self.trained.estimate, "compared": self.trained.compared}}
        report |= {"temperature": self.temperature} if self.task.classifies else {}
        report |= {"calibration": self.calibration.to_dict()} if self.calibration else {}
        return report | ({"corruptions": self.corruptions} if self.corruptions else {})


def evaluate(
    model: str | os.PathLike[str] | nn.Module,
    data: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | None = None,
    apply: Sequence[Any] | None = None,
    corruptions: bool = False,
    calibrate: bool = False,
    remove_calibration: bool = False,
    split: Literal["auto", "all", "val", "test", "train"] = "auto",
    val_fraction: float | None = None,
    seed: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    runtime: str = "eager",
    output: str | os.PathLike[str] | None = None,
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    notify: Notify = quiet,
) -> Evaluation:
    """Evaluate a model on labelled data by the metrics of its task. Labels are matched by name if the model has names.

    Args:
        model: a file of `vitarium.save`, a model's name, or a model. A model with `apply` is changed.
        data: as for `vitarium.open_data`; None: that of the model's training, else the default of its task.
        checkpoint: weights for a name.
        apply: methods to apply first, as "evit:keep=0.7".
        corruptions: also measure a classifier's error under ImageNet-C's corruptions, at five severities each.
        calibrate: fit a classifier's temperature on half of the images (chosen by the seed), measure it on the other half, and write it
            into the model's file, or into the record of a model that is given as an object; its probabilities then agree with how often
            they are right, while its logits stay as they are.
        remove_calibration: remove the temperature again.
        split: part of the data; "auto": of the data that the model was trained on what was held out then, else the held-out part, or
            every labelled image of data without one.
        val_fraction, seed: of the part that is held out of data without parts, instead of every image.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        runtime: what executes the model: "eager", "compile", "onnxruntime" or "openvino" (see `vitarium.efficiency.runtimes`).
        output: JSON file for all metrics.
        engine: where the model runs: "local"; "ray", a Ray cluster, which chooses the device; or a `vitarium.engine.Engine`.
        address: of a running Ray cluster, "auto" or "HOST:PORT".
        jobs: processes that hold the model.
        notify: called with messages about progress.

    Raises:
        UsageError: unknown name or method, a head that was never trained, corruptions or calibration for a model that is no classifier,
            or a calibration of what is no file or model.
        WriteError: a file cannot be written; `error.result` is what would be returned.
        DataError: no such data, labels that the model does not have, too many images that cannot be read, or images from which no
            temperature follows.
        CheckpointError: weights that are not available.
        MissingExtra: engine="ray" without Ray.
    """
    from vitarium.catalog.heads import require_head
    from vitarium.catalog.record import training_of
    from vitarium.data.image_set import size_of
    from vitarium.files import check_output, write_json
    from vitarium.training.tasks import task_of

    check_output(output)
    if calibrate and remove_calibration:
        raise UsageError("calibrate and remove_calibration exclude each other; give one of them")
    if calibrate or remove_calibration:
        check_calibration(model, apply, engine)
    opened = open_model(model, checkpoint)
    require_head(opened)
    task = task_of(opened)
    if calibrate and not task.classifies:
        raise UsageError(f"a temperature scales the softmax over exclusive classes; this model's task is {task.name}")
    if corruptions and not task.classifies:
        raise UsageError(f"corruptions count the errors of a classifier; this model's task is {task.name}")
    images = open_to_evaluate(opened, data, split=split, seed=seed, val_fraction=val_fraction, calibrated=bool(apply), notify=notify)
    apply_methods(opened, apply, images, notify)
    where = as_engine(engine, address=address, jobs=jobs)
    if where.kind == "local" and not where.in_process:
        raise UsageError(f"several processes for images (jobs={where.jobs}) are Ray's: give engine='ray' (--engine ray) with them")
    if corruptions and where.kind != "local":
        raise UsageError("corruptions are measured by the local engine only; leave out corruptions or engine")
    opened = execute(opened, runtime, device=device, engine=where, task=task, source=None if apply else model, notify=notify)
    part = images.val
    seen = trained_on(opened, part)
    fitted = calibrated(opened, images, seen, seed or 0, batch_size, notify) if calibrate else None
    changed = calibrate or remove_calibration
    with _undone_on_error(training_of(opened)) as record:
        if changed:
            record.temperature, record.calibration = (fitted.temperature, fitted.record()) if fitted else (None, None)
        notify(f"Evaluating on {len(part)} images")
        parts = None if output is None else f"{output}.parts"
        values, broken = measure(opened, part, batch_size, where, total=size_of(images), parts=parts, notify=notify)
        values |= {"loss": fitted.loss_after, "calibration_error": fitted.error_after} if fitted else {}
        found = Evaluation(name_of(model), images.name, images.part, len(part) - len(broken), task.report(values, images), broken, task)
        found.notes, found.trained = images.notes, seen
        found.temperature, found.calibration = record.temperature, fitted
        if corruptions:
            found.corruptions = measure_corrupted(opened, part, images, batch_size, seed or 0, notify)
        if changed and isinstance(model, str | os.PathLike):
            with kept(found):
                found.kept_card = _write_calibration(model, record)
        if output is not None:
            with kept(found):
                write_json(Path(output), found.to_dict())
    return found


@contextlib.contextmanager
def _undone_on_error(record: Training) -> Iterator[Training]:
    """Give a model's record its calibration of before if something fails inside, so that a model object stays as it was."""
    before = record.temperature, record.calibration
    try:
        yield record
    except BaseException:
        record.temperature, record.calibration = before
        raise


def _write_calibration(file: str | os.PathLike[str], record: Training) -> Path | None:
    """Write a calibration into a saved file, and into the card beside it if there is one.

    Returns:
        a card that its user has edited, which stays as it is; None otherwise.
    """
    from vitarium.catalog.saving import change_record
    from vitarium.reports.card import card_path, write_card

    change_record(os.fspath(file), temperature=record.temperature, calibration=record.calibration)
    card = card_path(file)
    return card if card.exists() and write_card(file) is None else None


def check_calibration(model: str | os.PathLike[str] | nn.Module, apply: Sequence[Any] | None, engine: str | Engine) -> None:
    """Refuse a calibration that has no place for its result.

    Raises:
        UsageError: a name, methods of this call alone, or an engine of several processes.
    """
    on_hub = str(model).startswith("hf:")
    if isinstance(model, str | os.PathLike) and (on_hub or not is_model_file(model)):
        what = "on the hub" if on_hub else "a name"
        raise UsageError(
            f"a calibration is written into the model's file, and {model} is {what}; 'vitarium.save' writes a file, as every training does"
        )
    if apply:
        raise UsageError(
            "a calibration is written into the model's file, which lacks the methods of --apply; calibrate the output of compress"
        )
    if as_engine(engine).kind != "local":
        raise UsageError("a calibration is fitted by the local engine only; leave out calibrate or engine")


def calibrated(opened: nn.Module, images: ImageData, seen: Seen | None, seed: int, batch_size: int, notify: Notify) -> Calibration:
    """Fit a classifier's temperature on half of the images; the model is unchanged.

    Raises:
        DataError: images that the model was trained on, or from which no temperature follows.
    """
    from vitarium.data import BadFiles
    from vitarium.data.image_set import size_of
    from vitarium.training.calibration import calibrate

    if seen is not None and seen.trained > MOST_TRAINED * seen.compared:
        raise DataError(
            f"the model was trained on {seen} of these images, on which it is more often right than on new ones, so they cannot calibrate "
            "it; give images that were held out (--split auto)"
        )
    notify(f"Fitting the temperature on half of {len(images.val)} images")
    return calibrate(opened, images.val, seed=seed, batch_size=batch_size, bad_files=BadFiles(total=size_of(images)))


def calibration_table(found: Calibration) -> TableData:
    """Return the calibration error and the cross entropy before and after the fit."""
    rows = [
        ["calibration error", f"{100 * found.error_before:.2f} %", f"{100 * found.error_after:.2f} %"],
        ["cross entropy", f"{found.loss_before:.4f}", f"{found.loss_after:.4f}"],
    ]
    return TableData(f"Calibration, the other {found.measured} images", ["", ">before", ">after"], rows)


def trained_on(model: nn.Module, images: ImageSet) -> Seen | None:
    """Return how many of the images a model was trained on; None if its record does not say."""
    from vitarium.catalog.record import training_of
    from vitarium.training.fingerprints import trained_among

    record = training_of(model).data
    seen = None if record is None or record.images is None else trained_among(images, record.images)
    return seen if seen is not None and seen.compared else None


def measure(
    model: nn.Module,
    images: ImageSet,
    batch_size: int,
    engine: str | Engine = "local",
    *,
    total: int | None = None,
    parts: str | None = None,
    notify: Notify = quiet,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the metrics of a model's task and learner, and the images that could not be read.

    Args:
        total: number of images of the whole data set, of which 1 % may be broken, as in training; None: that of `images`.

    Raises:
        UsageError: the task has no metrics.
        DataError: too many images cannot be read.
    """
    from vitarium.catalog.record import training_of
    from vitarium.data import BadFiles
    from vitarium.perception.retrieval.index import model_fingerprint
    from vitarium.training import evaluate as run
    from vitarium.training.learners import learner_of
    from vitarium.training.parts import evaluate_in_parts
    from vitarium.training.tasks import task_of

    bad_files, where = BadFiles(total=total), as_engine(engine)
    if where.kind == "local":
        values = run(model, images, batch_size=batch_size, bad_files=bad_files)
    else:
        temperature = training_of(model).temperature
        identity = {"weights": model_fingerprint(model), "batch_size": batch_size, "first": images.describe(0), "count": len(images)}
        values = evaluate_in_parts(
            learner_of(model),
            images,
            batch_size=batch_size,
            bad_files=bad_files,
            engine=where,
            parts=parts,
            identity=identity if temperature is None else {**identity, "temperature": temperature},
            progress=lambda done, total: notify(f"Evaluating: {done} of {total} images"),
        )
    if not values:
        task = task_of(model)
        raise UsageError(f"the task {task.name} has no metrics on held-out images; {task.no_answer or 'there is nothing to evaluate'}")
    return values, [{"path": path, "reason": reason} for path, reason in bad_files.items()]


def measure_corrupted(model: Any, images: ImageSet, data: ImageData, batch_size: int, seed: int, notify: Notify = quiet) -> dict[str, Any]:
    """Return the errors of a classifier under each corruption; with ImageNet's 1000 classes also relative to AlexNet's."""
    from vitarium.data import BadFiles
    from vitarium.data.image_set import size_of
    from vitarium.robustness.benchmark import ALEXNET, corruption_errors

    found = corruption_errors(
        model,
        images,
        batch_size=batch_size,
        seed=seed,
        bad_files=BadFiles(total=size_of(data)),
        progress=lambda done: notify(f"Corrupting images: {done} of {len(images)}"),
    )
    whole = len(data.classes) == 1000 and len(found.errors) == len(ALEXNET)
    return {**found.to_dict(), **({"over_alexnet": found.over_alexnet} if whole else {})}


def corruption_table(found: dict[str, Any]) -> TableData:
    """Return errors in percent, a row a corruption, a column a severity."""
    rows = [
        [kind.replace("_", " "), *(f"{100 * e:.1f}" for e in errors), f"{100 * found['by_kind'][kind]:.1f}"]
        for kind, errors in found["errors"].items()
    ]
    return TableData("Errors by severity, %", ["corruption", *(f">{s}" for s in found["severities"]), ">mean"], rows)
