"""Train one model by one recipe."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import CheckpointError, DataError, NotSaved, UsageError, WriteError
from vitarium.files import is_model_file
from vitarium.training.tasks.base import TableData, Task
from vitarium.verbs.opening import Notify, apply_methods, name_of, open_model, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from torch import nn

    from vitarium.data import ImageData
    from vitarium.training import FitResult, Learner, Progress, Recipe

log = logging.getLogger("vitarium")


LOOKED_AT = 32
"""Number of images, evenly spaced, whose size is compared with that of the input."""
RESIZING = ("classify", "multilabel", "retrieve", "segment")
"""Tasks that reduce whole images to the input."""


@dataclass(repr=False)
class Trained(Result):
    """A trained model.

    Attributes:
        model: in eval mode, with its labels, preprocessing and training record.
        file: its saved file.
        fit: metrics, history, steps, seconds, images that could not be read, skipped steps.
        task: its task.
        use: the command to use it.
        notes: what was left out, ignored or assumed when the data was opened.
        page: the run's report, a self-contained HTML page; None if it could not be written.
    """

    model: nn.Module = field(repr=False)
    file: Path
    fit: FitResult
    task: Task = field(repr=False)
    use: str
    notes: tuple[str, ...] = ()
    page: Path | None = None

    @property
    def finished_before(self) -> str:
        """Note for the case that the run had ended before this call, so that nothing was trained; "" if something was."""
        if self.fit.earlier < self.fit.steps:
            return ""
        folder = self.file.parent
        return (
            f"{folder} holds a finished run of {self.fit.steps} steps: nothing was trained, and this is its result. To train again: "
            "another --out; to train on: --model FILE with another --out"
        )

    def facts(self) -> dict[str, Any]:
        before = {"note": self.finished_before} if self.finished_before else {}
        return {
            **before,
            "file": self.file,
            **self.task.texts(self.fit.metrics),
            "steps": self.fit.steps,
            "seconds": round(self.fit.seconds, 1),
        }

    def tables(self) -> list[TableData]:
        names = [name for name in (self.fit.history[-1] if self.fit.history else {}) if name != "epoch"]
        rows = [[f"{entry.get(name, ''):.4g}" if name in entry else "" for name in names] for entry in self.fit.history]
        return [TableData("Evaluations", [f">{name}" for name in names], rows)]

    def to_dict(self) -> dict[str, Any]:
        done = self.fit
        return {
            "file": str(self.file),
            "task": self.task.name,
            "metrics": done.metrics,
            "steps": done.steps,
            "seconds": done.seconds,
            "skipped": done.skipped,
            "broken": [{"path": path, "reason": reason} for path, reason in done.bad_files],
            "history": done.history,
            "notes": list(self.notes),
            "best_step": done.best_step,
            "page": None if self.page is None else str(self.page),
        }


@dataclass
class Job:
    """A training that is ready to begin.

    Attributes:
        recipe: with the changes, and the image size that is used.
        learner: with its model, methods applied.
        images: the data, in the model's numbering of the labels.
        task: of the learner.
        name: of the model, for reports.
        source: the data as it was given.
        folder: of the run.
    """

    recipe: Recipe
    learner: Learner
    images: ImageData
    task: Task
    name: str
    source: str | None
    folder: Path


def train(
    recipe: str | os.PathLike[str] | Recipe | None = None,
    data: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | str | None = None,
    image_size: int | None = None,
    changes: Sequence[str] | None = None,
    apply: Sequence[Any] | None = None,
    log: Sequence[str] | str | None = None,
    val_fraction: float = 0.2,
    out: str | os.PathLike[str] | None = None,
    trained_only: bool = False,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    progress: Callable[[str, Task, Progress], None] | None = None,
    notify: Notify = quiet,
) -> Trained | None:
    """Train a model by a recipe and save it as OUT/model.safetensors. The same call resumes an interrupted run.

    Args:
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        data: as for `vitarium.open_data`; None: the recipe's.
        model: a model's name; a file of `vitarium.save` or a model, which is trained further and keeps its labels; None: the recipe's.
            For other classes than a file's, give its name and `checkpoint`.
        pretrained: start from published weights.
        checkpoint: start from these weights: file, "hf:OWNER/NAME", or address.
        epochs, steps: length of the training, in place of the recipe's.
        lr, image_size: the recipe's `optimizer.lr` and `image_size`.
        batch_size: the recipe's; "auto": the largest that fits, which a resumed run uses again (see `vitarium.training.batch_finder`).
        changes: further changes of the recipe, as "optimizer.weight_decay=0.1".
        apply: methods to apply before training, as "evit:keep=0.7"; None: the recipe's.
        log: loggers beside log.csv: "tensorboard", "wandb", "mlflow", several as a list or separated by commas; None: the recipe's.
        val_fraction: share held out of data that has no val/ part.
        out: folder of the run; None: runs/RECIPE-MODEL-DATA.
        trained_only: save only the trained part; the file then needs the weights that the model started from.
        devices, num_nodes, strategy, accelerator: see `vitarium.training.fit`.
        progress: called several times per second with the model's name, its task and the progress.
        notify: called with the reports of methods, and the batch that was found.

    Returns:
        the trained model; None in processes other than the first.

    Raises:
        UsageError: no such recipe, model, setting or method; a setting that is given twice; or the folder holds another run.
        DataError: the data cannot be used, or has labels that a given model does not have.
        CheckpointError: the weights cannot be used.
        TrainingStopped: see `fit`. Where only the last checkpoint does not fit on the disk, the model is saved, with a warning.
        KeyboardInterrupt: the run was interrupted; its state is saved.
    """
    import vitarium
    from vitarium.catalog.saving import check_trained_only
    from vitarium.reports.card import write_card
    from vitarium.reports.trial import is_main_process
    from vitarium.training.fitting import fit_saved_or_not
    from vitarium.training.phases import settled
    from vitarium.training.recording import record_results, record_run, record_training
    from vitarium.training.report import write_run_report
    from vitarium.training.shorthands import names_of_loggers, with_shorthands

    found = batch_size == "auto"
    short = dict(
        epochs=epochs, steps=steps, lr=lr, batch_size=None if found else batch_size, image_size=image_size, log=names_of_loggers(log)
    )
    given = with_shorthands(list(changes or []), short, searched="batch_size" if found else None)
    job = open_job(recipe, data, model, pretrained, checkpoint, given, apply, val_fraction, out, notify)
    learner, images, folder = job.learner, job.images, job.folder
    if trained_only:
        with settled(learner, job.recipe):
            check_trained_only(learner.eval_model())
    if found:
        job.recipe = _with_batch(job, accelerator, devices * num_nodes, notify)
    report = None if progress is None else lambda at: progress(job.name, job.task, at)
    where: dict[str, Any] = dict(devices=devices, num_nodes=num_nodes, strategy=strategy, accelerator=accelerator)
    result, unsaved = fit_saved_or_not(learner, images, job.recipe, folder, **where, progress=report)
    if not is_main_process():
        return None
    record_training(learner, images, source=job.source or job.task.default_data, seed=job.recipe.seed, val_fraction=val_fraction)
    trained, file = learner.eval_model().eval(), folder / "model.safetensors"
    recipe_used = job.recipe.model_copy(update=dict(model=None, data=None)).model_dump(mode="json", exclude_unset=True, exclude_none=True)
    record_run(trained, recipe_used, result.best_step or result.steps)  # the record has the model's name and its data, maybe other ones
    record_results(trained, {key: value for key, value in result.metrics.items() if key != "train_loss"}, images)
    if result.earlier >= result.steps:
        keep_calibration(trained, file)
    with checkpoint_or_model(unsaved, file):
        vitarium.save(trained, file, trained_only=trained_only)
    write_card(file)
    page = write_run_report(folder, job.name, trained, job.task, images, job.recipe, result)
    use = (learner.usage or job.task.usage).format(file=shlex.quote(str(file)))
    return Trained(trained, file, result, job.task, use, images.notes, page)


@contextlib.contextmanager
def checkpoint_or_model(unsaved: NotSaved | None, file: Path) -> Iterator[None]:
    """Warn of a last checkpoint that could not be written once the model is saved inside; raise its error if the model cannot be, either.

    Args:
        unsaved: the error of the checkpoint, if any.
        file: of the model.
    """
    try:
        yield
    except WriteError as error:
        raise unsaved or error from None
    if unsaved is not None:
        log.warning("%s is complete, but not the run's checkpoint: %s; the same command would train again", file, unsaved.reason)


def keep_calibration(model: nn.Module, file: Path) -> None:
    """Give a model the calibration of its file, if there is one: that of a finished run may have been calibrated since."""
    from vitarium.catalog.record import training_of
    from vitarium.reports.card import read_facts

    with contextlib.suppress(CheckpointError):  # missing or damaged: it is written again
        there = read_facts(file).record
        known = {"temperature": there.temperature, "calibration": there.calibration}
        model.training_record = training_of(model).model_copy(update=known)  # type: ignore[assignment]


def open_job(
    recipe: str | os.PathLike[str] | Recipe | None,
    data: str | os.PathLike[str] | None,
    model: str | os.PathLike[str] | nn.Module | None,
    pretrained: bool,
    checkpoint: str | None,
    changes: list[str],
    apply: Sequence[Any] | None,
    val_fraction: float,
    out: str | os.PathLike[str] | None,
    notify: Notify,
) -> Job:
    """Read the recipe, open the data, and create the learner of a training; see `train` for the arguments and errors."""
    from vitarium.catalog.saving import is_partial
    from vitarium.reports.folder import slug
    from vitarium.training import find_learner
    from vitarium.training.learners import check_suits
    from vitarium.training.opening import load_recipe, with_changes

    if recipe is None:
        raise UsageError(no_recipe(model))
    named = isinstance(recipe, str | os.PathLike)
    settings = load_recipe(os.fspath(recipe), changes) if named else with_changes(recipe, changes)  # type: ignore[arg-type]
    given = model if model is not None else settings.model
    if given is None:
        raise UsageError(f"the recipe {recipe if named else ''} names no model; choose one with --model ('vitarium models' lists them)")
    name, kind = name_of(given), find_learner(settings.objective["name"])
    if is_model_file(given) and (pretrained or (checkpoint is not None and not is_partial(given))):  # type: ignore[arg-type]
        raise UsageError(f"{name} holds its own weights; give --pretrained or --checkpoint only with a model's name")
    source_model: Any = given
    if is_model_file(given):
        source_model, checkpoint = open_model(given, checkpoint), None  # of the trained part of a model: the weights below it
    check_suits(kind, name, None if isinstance(source_model, str) else source_model)
    task = kind.task_for(settings.settings_of(kind))
    source = os.fspath(data) if data is not None else settings.data
    images = task.open(source, seed=settings.seed, val_fraction=val_fraction, image_size=settings.image_size)
    settings = settings.model_copy(update=dict(image_size=settings.image_size or images.image_size))
    stem = Path(os.fspath(recipe)).stem if named else settings.objective["name"]  # type: ignore[arg-type]
    folder = Path(out) if out is not None else Path("runs", slug(f"{stem}-{name}-{images.name}"))
    if not isinstance(source_model, str):
        images = matched(source_model, task, images, pretrained, name)
    learner = kind.create(source_model, images, settings, pretrained=pretrained, checkpoint=checkpoint)
    apply_methods(learner.model, settings.apply if apply is None else apply, images, notify)
    if (sentence := small_input(learner, task, images, settings.image_size)) is not None:
        notify(f"{sentence}\n")
    return Job(settings, learner, images, task, name, source, folder)


def small_input(learner: Learner, task: Task, images: ImageData, image_size: int | None) -> str | None:
    """Return the sentence on an input that is much smaller than the images, from `LOOKED_AT` of them; None if it is not.

    Args:
        image_size: the recipe's, pixels; None: the model's own.
    """
    import statistics

    from vitarium.catalog import preprocessing_of
    from vitarium.reports.results import input_sentence, larger_input

    side = image_size or preprocessing_of(learner.model).image_size
    if task.name not in RESIZING or side is None:
        return None
    sizes: list[tuple[int, int]] = []
    for index in range(0, len(images.train), max(1, len(images.train) // LOOKED_AT)):
        with contextlib.suppress(DataError):  # broken images are the training's to report
            size = getattr(images.train[index][0], "size", None)
            sizes += [size] if isinstance(size, tuple) and len(size) == 2 else []
    if not sizes:
        return None
    median = [int(statistics.median(sides)) for sides in zip(*sizes, strict=True)]
    return input_sentence("the model sees", [side], median) if larger_input(median) > side else None


def no_recipe(model: Any) -> str:
    """Return the message for a call without a recipe: the recipes that fit, and the options that change one."""
    from vitarium.verbs.recipes import recipes

    name = None if model is None or is_model_file(model) or not isinstance(model, str) else model
    rows = [row for row in recipes(name).rows if name is not None or row.task == "classify"]
    rows.sort(key=lambda row: row.name != "pico")  # the one to begin with
    width = max(len(row.name) for row in rows) if rows else 0
    which = f"for {name}" if name is not None else "for classification ('vitarium recipes' lists those for other tasks, too)"
    lines = [f"  {row.name:{width}}  {row.summary}" for row in rows]
    return "\n".join(
        [
            f"a recipe is missing: vitarium train RECIPE --data DIR. Recipes {which}:",
            *lines,
            "options that change it: --epochs or --steps, --lr, --batch-size, --image-size, and --set KEY=VALUE for any other key "
            "('vitarium recipes RECIPE' shows all of them)",
        ]
    )


def _with_batch(job: Job, accelerator: str, processes: int, notify: Notify) -> Recipe:
    """Return the recipe with the largest batch that fits, which is recorded in the run's folder.

    Raises:
        UsageError: several processes, each of which would find its own.
    """
    from vitarium.training.batch_finder import batch_size_for
    from vitarium.training.processes import create_fabric

    if processes > 1:
        raise UsageError("--batch-size auto searches in one process; find it with --devices 1, and give the number for several")
    device = create_fabric(1, 1, "auto", accelerator, job.recipe.precision).device
    choice = batch_size_for(job.folder, job.learner, job.images, job.recipe, device)
    notify(f"batch_size={choice.batch_size}: {choice.reason}\n")
    return job.recipe.model_copy(update={"batch_size": choice.batch_size})


def matched(model: Any, task: Task, images: ImageData, pretrained: bool, name: str) -> ImageData:
    """Return the data with a given model's numbering of the labels; a classifier without labels gets those of the data.

    Raises:
        UsageError: `pretrained` weights for a model that has its own.
        DataError: labels that the model does not have, or another number of classes.
    """
    if pretrained:
        raise UsageError("a model that is given as an object has its own weights; pretrained is for a model's name")
    try:
        images = task.match(model, images)
    except DataError as error:
        spec = getattr(getattr(model, "spec", None), "name", "NAME")
        raise DataError(f"{error}; for a new head on these weights: --model {spec} --checkpoint {shlex.quote(name)}") from error
    if task.classifies and getattr(model, "labels", None) is None:
        model.labels = list(images.classes)
    return images
