"""Train several models on the same images under the same budget, measure them, and recommend one.

What they are trained for is the recipe's task: it opens the data, measures, and names the primary metric.

    comparison = compare("photos/", ["swin_tiny", "convnext_tiny"], steps=2000, image_size=224)
    print(comparison.recommendation)

In the output folder:

    results.json, results.csv   the numbers
    report.html                 one page with all of it, opens offline
    best.safetensors            the model with the best score; `vitarium.load` needs nothing else
    comparison.json             what was asked, by which an interrupted comparison is recognised
    models/NAME/                a folder a model: checkpoints, logs, model.safetensors, and result.json once it is finished
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.data import ImageData, open_data
from vitarium.data.opening import embedded
from vitarium.efficiency.runtimes import check_runtime
from vitarium.engine import Engine, Job, Outcome, RunEvent, as_engine, run_all
from vitarium.engine.machine import describe_machine
from vitarium.engine.runs import result_of
from vitarium.errors import DataError, InputError, NotSaved, TrainingStopped, UsageError, VitariumError, WriteError
from vitarium.files import atomic_path, lock_folder, write_text
from vitarium.reports.disk import measured, of_disk
from vitarium.reports.events import Event, Listener
from vitarium.reports.folder import ERROR, claim, default_folder, plan_of, slug
from vitarium.reports.inspection import Inspection, inspect
from vitarium.reports.looking import still
from vitarium.reports.names import (
    DEFAULT_MODELS,
    check_kind,
    check_names,
    check_weights,
    default_models,
    default_recipe,
    task_of_recipe,
)
from vitarium.reports.page import sections_of, write_report
from vitarium.reports.results import Comparison, Failure, Trial
from vitarium.reports.trial import MEASURING_BATCH, MODEL, DataSource, Devices, is_main_process, run_trial, started_together
from vitarium.training import Progress, Recipe, load_recipe
from vitarium.training.tasks import GalleryData, Metric, Task

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("vitarium")

PICO_SIZE = 32
"""Side of the input of the default models where the images have no natural size, pixels."""


def compare(
    data: str | Path | None = None,
    models: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    recipe: str | Path | None = None,
    batch_size: int | None = None,
    val_fraction: float = 0.2,
    pretrained: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    runtime: str = "eager",
    progress: Listener | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train each model under the same budget, evaluate and time it, and write the results to a folder.

    Interrupted or killed at any point and called again with the same arguments, it continues, whichever engine worked before: finished
    models stay as they are, others resume from their last checkpoints. A model that fails, or loses its process or machine, is tried once
    more and then named in the report. Models that failed are tried again by the next call. With further models, everything else as before
    and the same `out`, those that are finished are kept and the others are trained.

    Args:
        data: "fashion", "digits", "photos", "scenes", or a path, see `vitarium.open_data`; by default the recipe's ("fashion" without a
            recipe), else the default of its task.
        models: names as `create_model` takes them; by default six small classifiers of different families, or the recipe's model where
            the recipe's task is another one.
        steps, epochs, minutes: the training of each model, at most one of them; the recipe's own budget by default.
        image_size: side of the input, pixels; by default the images' own, else each model's own.
        recipe: name or YAML file of everything else about training; it also decides the task. By default "fashion" without data or for
            `data="fashion"`, else "pico".
        batch_size: images a step; the recipe's by default.
        val_fraction: share held out of data that is not split yet.
        pretrained: start from published weights.
        seed: of the split, the weights and the order of the data.
        out: folder for the results; by default "runs/DATA-DATE", or the newest folder there that holds this very comparison. Under
            torchrun or SLURM it must be given and be shared; only the first process returns, the others leave with SystemExit(0). A Ray
            cluster of several machines needs a shared folder too.
        devices, num_nodes, strategy, accelerator: of the training of one model, as Lightning Fabric takes them.
        engine: where the models are trained: "local", this machine; "ray", a Ray cluster (`pip install 'vitarium[cluster]'`); or an
            `engine.Engine` with CPUs and GPUs a model.
        address: of a running Ray cluster, "auto" or "HOST:PORT"; by default Ray is started on this machine.
        jobs: models at a time; by default 1 locally, and as many as the cluster's CPUs and GPUs allow. Models that are timed while others
            train on the same machine look slower than they are; the report mentions it.
        runtime: "compile", "onnxruntime" or "openvino": the trained models are timed with it as well, and recommended by that latency.
        progress: called with an `Event` whenever something happens.
        notify: called with sentences before the training: duplicates in the data, the expected time, and ways to shorten a long one.

    Raises:
        UsageError: unknown names, or names without the published weights asked for (all at once); more than one budget; a folder that holds
            another comparison or is in use.
        DataError: data that cannot be used; before any model is built.
        TrainingStopped: every model failed.
        KeyboardInterrupt: the message says that the same call continues.
        WriteError: the disk is full or read-only; `error.result` is the comparison of the models that were measured, if any.
        MissingExtra: engine="ray" without Ray, or a runtime that is not installed.
    """
    recipe = default_recipe(data) if recipe is None else recipe
    settings = _recipe(recipe, pixels=image_size, seed=seed, steps=steps, epochs=epochs, minutes=minutes, batch_size=batch_size)
    names = list(models) if models is not None else default_models(settings)
    check_names(names)
    check_weights(names, pretrained)
    check_runtime(runtime)
    where, task = as_engine(engine, address=address, jobs=jobs), task_of_recipe(settings)
    _check_engine(where, devices * num_nodes, out)
    if runtime != "eager" and task.eager_only:
        raise UsageError(f"models of the task {task.name} run with --runtime eager only: {task.eager_only}")
    images, source = _opened(data, task, settings, seed, val_fraction, image_size)
    check_kind(names, images)
    if settings.image_size is None:
        size = images.image_size or (PICO_SIZE if models is None and names == list(DEFAULT_MODELS) else None)
        settings = settings.model_copy(update=dict(image_size=size))
    main = is_main_process() or not where.in_process
    plan = plan_of(images, names, settings, pretrained, processes=devices * num_nodes, runtime=runtime)
    folder = Path(out) if out is not None else default_folder(Path("runs"), images, plan)
    with lock_folder(folder) if main else nullcontext(), _continued_by_the_same_command(folder):
        if main:
            claim(folder, plan, images)
            inspection = inspect(images, classes=task.classifies, seed=seed)
            announce(inspection, names, images, settings, folder, where, accelerator, notify)
        given = dict(source=source, recipe=settings, pretrained=pretrained, devices=Devices(devices, num_nodes, strategy, accelerator))
        given["runtime"] = runtime
        trials, failures, full = _run(names, folder, given, where, progress or (lambda event: None))
        if not main:
            raise SystemExit(0)  # a helper process has nothing to return
        shared = dict(recipe=str(recipe), pretrained=pretrained, devices=devices * num_nodes, accelerator=accelerator)
        comparison = _compared(folder, images, settings, task, trials, failures, inspection, _settings(shared, settings, where))
        try:
            if full is not None:
                raise full
            finish(comparison, images)
        except WriteError as error:
            error.result = comparison
            raise
    return comparison


def _opened(
    data: str | Path | None, task: Task, recipe: Recipe, seed: int, val_fraction: float, image_size: int | None
) -> tuple[ImageData, DataSource]:
    """Open the data of a comparison, and return it with the arguments by which other processes open it."""
    spec = data if data is not None else embedded(recipe.data or task.default_data)
    side = recipe.image_size if task.data_kind != "class" else image_size  # classes: images that keep their size, unless asked for
    opening: dict[str, Any] = dict(seed=seed, val_fraction=val_fraction, image_size=side)
    images = open_data(spec, task=task.data_kind, **opening)
    return images, DataSource.of(images, spec, labels=task.data_kind, **opening)


@contextlib.contextmanager
def _continued_by_the_same_command(folder: Path) -> Iterator[None]:
    """Say in the message of an interruption how the comparison goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the comparison in {folder} was interrupted; the same command continues it") from None


def _settings(shared: dict[str, Any], recipe: Recipe, engine: Engine) -> dict[str, Any]:
    """Return `Comparison.settings`."""
    at_a_time = engine.jobs or (1 if engine.in_process else "several")
    numbers = dict(batch_size=recipe.batch_size, seed=recipe.seed, measuring_batch=MEASURING_BATCH)
    return {**shared, **numbers, "engine": engine.kind, "at_a_time": at_a_time}


def _compared(
    folder: Path,
    images: ImageData,
    recipe: Recipe,
    task: Task,
    trials: list[Trial],
    failures: list[Failure],
    inspection: Inspection,
    settings: dict[str, Any],
) -> Comparison:
    """Return the comparison of trained models."""
    return Comparison(
        folder=folder,
        data=images.name,
        images={"train": len(images.train), "val": len(images.val)},
        classes=list(images.classes),
        budget=recipe.budget.model_dump(exclude_none=True),
        settings=settings,
        machine=describe_machine(),
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        trials=trials,
        failures=failures,
        task=task.record(),
        baseline=task.baseline(images),
        notes=list(images.notes),
        inspection=inspection,
    )


def announce(
    inspection: Inspection,
    names: Sequence[str],
    images: ImageData,
    recipe: Recipe,
    folder: Path,
    engine: Engine,
    accelerator: str,
    notify: Callable[[str], None],
) -> None:
    """Send what is known before the training: duplicates, and the expected time of models that are trained here one after the other."""
    from vitarium.reports.estimate import estimate

    for sentence in inspection.duplicates.sentences():
        notify(f"{sentence}\n")
    waiting = [name for name in names if result_of(_job(name, folder, {})) is None]
    if waiting and engine.in_process and not started_together():
        notify("Estimating the time")
        expected = estimate(waiting, images, recipe, gpu=accelerator != "cpu")
        if expected.seconds:
            notify(f"{expected.text()}\n")


def _check_engine(engine: Engine, processes: int, out: str | Path | None) -> None:
    """Refuse data-parallel training of models that run side by side, and processes that would each choose a folder.

    Raises:
        UsageError: several devices a model with Ray, several machines with several jobs, or processes of one training without a folder.
    """
    if out is None and engine.in_process and started_together():
        raise UsageError("several processes were started, and all need the same folder: name it with out (--out), on a shared disk")
    if processes > 1 and not engine.in_process:
        raise UsageError(
            "with --engine ray or several --jobs each model is trained on one device; for one training over several devices or machines "
            "take --devices and --num-nodes with the local engine (torchrun, SLURM)"
        )


def finish(comparison: Comparison, images: ImageData) -> None:
    """Write the results, the best model's file and the page."""
    for bad in comparison.bad_files:
        log.warning("left out, because it cannot be read: %s (%s)", bad["path"], bad["reason"])
    comparison.write()
    best = comparison.best
    with atomic_path(comparison.folder / "best.safetensors") as temporary:
        shutil.copyfile(comparison.folder / best.file, temporary)
    examples = {shown.index: still(images.train, shown.index) for shown in comparison.inspection.examples}
    write_report(comparison, gallery_images(comparison, images), examples)


def gallery_images(comparison: Comparison, images: ImageData) -> dict[int, Image.Image | None]:
    """Return the held-out images that the report shows, by their place; None where one cannot be read any more."""
    galleries = [section for section in sections_of(comparison) if isinstance(section, GalleryData)]
    return {shown.index: still(images.val, shown.index) for gallery in galleries for shown in gallery.images}


def _recipe(name: str | Path, *, pixels: int | None, seed: int, **given: Any) -> Recipe:
    """Return the recipe with what the caller set, checked together.

    Raises:
        UsageError: more than one budget, or values that the recipe refuses.
    """
    budgets = {key: given.pop(key) for key in ("steps", "epochs", "minutes")}
    budgets = {key: value for key, value in budgets.items() if value is not None}
    if len(budgets) > 1:
        raise UsageError(f"give one budget, not {' and '.join(budgets)}")
    changes = {f"budget.{key}": value for key, value in budgets.items()}
    changes |= {"image_size": pixels, "seed": seed, **given}
    return load_recipe(name, [f"{key}={value}" for key, value in changes.items() if value is not None])


# ---- the models as runs of an engine


def _run(
    names: Sequence[str], folder: Path, settings: dict[str, Any], engine: Engine, listener: Listener
) -> tuple[list[Trial], list[Failure], WriteError | None]:
    """Run all models that are not finished, and return the trials, the failures, and the error of a disk that ended the comparison.

    Raises:
        UsageError, TrainingStopped: every model failed; the message has the reason of each.
        DataError, KeyboardInterrupt, WriteError (disk full before any model was measured): what would stop the next model as well.
    """
    jobs = [_job(name, folder, settings) for name in names]
    retries = 0 if engine.in_process and started_together() else 1  # processes of one training stay in step
    try:
        outcomes = run_all(jobs, engine, progress=_Translator(len(names), listener), fatal=stops_all, retries=retries)
    except (OSError, NotSaved) as error:
        if not of_disk(error):
            raise
        return measured(jobs, error)
    failed = {o.job.name: o.error for o in outcomes if o.error is not None}
    if len(failed) == len(names):
        kind = UsageError if all(isinstance(e, UsageError | InputError) for e in failed.values()) else TrainingStopped
        raise kind("no model could be compared:\n" + "\n".join(f"  {name}: {_reason(error)}" for name, error in failed.items()))
    failures = [Failure(name, _reason(error)) for name, error in failed.items()]
    return [trial_of(o) for o in outcomes if o.value is not None], failures, None


def _job(name: str, folder: Path, settings: dict[str, Any]) -> Job:
    return Job(name, train_and_measure, folder / "models" / slug(name), {"name": name, **settings}, files=(MODEL,))


def trial_of(outcome: Outcome) -> Trial:
    """Return the trial of a finished run."""
    assert outcome.value is not None
    return Trial.from_dict(outcome.value)


def train_and_measure(
    folder: Path,
    report: Callable[[Any], None],
    *,
    name: str,
    source: DataSource,
    recipe: Recipe,
    pretrained: bool,
    devices: Devices,
    runtime: str = "eager",
) -> dict[str, Any] | None:
    """Train, evaluate and measure one model: a run of an engine.

    Returns:
        the trial as JSON values; None in the helper processes of data-parallel training.
    """
    last: dict[str, Any] = {}

    def hear(progress: Progress, metric: Metric) -> None:
        left = progress.seconds / progress.step * (progress.total_steps - progress.step) if progress.step else None
        last.update(step=progress.step, steps=progress.total_steps, fraction=progress.step / max(1, progress.total_steps))
        last.update(loss=progress.loss, **_scored(metric, progress.metrics.get(metric.name)))
        report({"kind": "step", **last, "seconds_left": left})

    trial = run_trial(
        name,
        source.open(),
        recipe,
        folder,
        pretrained=pretrained,
        devices=devices,
        progress=hear,
        measuring=lambda: report({"kind": "measuring", **last}),
        source=source,
        runtime=runtime,
    )
    return None if trial is None else trial.to_dict()


def _scored(metric: Metric, score: float | None) -> dict[str, Any]:
    """Return a score as the fields of an `Event`."""
    if metric.share_of_images:
        return {"accuracy": score}
    return {} if score is None else {"score": f"{metric.label} {metric.short(score)}"}


def stops_all(error: Exception) -> bool:
    """Return whether an error would stop every other model too: data that cannot be used, or a disk that is full."""
    return of_disk(error) or isinstance(error, DataError)


class _Translator:
    """Turns the engine's events into those of a comparison, and writes the tracebacks of failures."""

    def __init__(self, count: int, listener: Listener):
        self.count, self.listener = count, listener
        self.latest: dict[str, dict[str, Any]] = {}

    def __call__(self, event: RunEvent) -> None:
        name, values = event.job.name, dict[str, Any]()
        kind: Any = event.kind
        if event.kind == "progress":
            values = dict(event.value)
            kind = values.pop("kind")
            self.latest[name] = {key: value for key, value in values.items() if key != "seconds_left"}
        elif event.kind in ("kept", "finished") and event.value is not None:
            trial = Trial.from_dict(event.value)
            done = dict(step=trial.steps, steps=trial.steps, fraction=1.0, **_scored(trial.metric, trial.score))
            values = {**self.latest.get(name, {}), **done}
        elif event.error is not None:
            values = {"message": _reason(event.error)}
            self._note(event)
        self.listener(Event(kind, name, event.position, self.count, **values))

    def _note(self, event: RunEvent) -> None:
        """Write the traceback to error.txt."""
        path = event.job.folder / ERROR
        verb = "failed" if event.kind == "failed" else "failed and is tried once more"
        assert event.error is not None
        log.warning("%s %s: %s (more in %s)", event.job.name, verb, _reason(event.error), path)
        with contextlib.suppress(OSError):  # the message is above
            write_text(path, event.traceback or str(event.error))


def _reason(error: Exception) -> str:
    """Return a message for a table; errors of other libraries with their kind."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, VitariumError) else f"{type(error).__name__}: {text.splitlines()[0][:300]}"
