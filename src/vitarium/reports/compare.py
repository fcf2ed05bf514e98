"""The main job: train several models on the same images under the same budget, measure them, and say which one to use.

    comparison = compare("photos/", ["swin_tiny", "convnext_tiny"], steps=2000, image_size=224)
    print(comparison.recommendation)

In the output folder:

    results.json, results.csv   the numbers
    report.html                 one page with all of it, opens offline
    best.safetensors            the most accurate model; `vitarium.load` needs nothing else
    comparison.json             what was asked, by which a comparison that was killed is known again
    models/NAME/                a folder a model: checkpoints, logs, model.safetensors, and result.json once it is finished
"""

from __future__ import annotations

import datetime
import errno
import logging
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.catalog import find_model
from vitarium.data import ImageData, open_data
from vitarium.data.clips import holds_clips, still_of
from vitarium.errors import DataError, InputError, TrainingStopped, UsageError, VitariumError, nearest
from vitarium.files import atomic_path, lock_folder, write_json, write_text
from vitarium.reports.events import Event, Listener
from vitarium.reports.folder import claim, default_folder, plan_of, read_json, slug
from vitarium.reports.machine import describe_machine
from vitarium.reports.page import write_report
from vitarium.reports.results import Comparison, Failure, Trial
from vitarium.reports.trial import MEASURING_BATCH, MODEL, Devices, is_main_process, run_trial, started_together
from vitarium.training import Progress, Recipe, load_recipe

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("vitarium")

DEFAULT_MODELS = ("swin_pico", "convnext_pico", "swin_mlp_pico", "convnext_iso_pico", "timm/vit_pico", "timm/resnet_pico")
"""Six of different families, small enough to learn the embedded digits in seconds."""
PICO_SIZE = 32
"""Side of the input of the default models where the pictures have no natural size, pixels."""


def compare(
    data: str | Path = "digits",
    models: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    recipe: str | Path = "pico",
    batch_size: int | None = None,
    val_fraction: float = 0.2,
    pretrained: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    progress: Listener | None = None,
) -> Comparison:
    """Train each model under the same budget, evaluate and time it, and write it all to a folder.

    Killed at any point and called again with the same arguments, it goes on: finished models stay as they are, the one under way resumes
    from its last checkpoint. Models that failed are tried again.

    Args:
        data: "digits", "photos", "scenes", or a path, see `vitarium.open_data`.
        models: names as `create_model` takes them; six small ones of different families by default.
        steps, epochs, minutes: the training of each model, at most one of them; the recipe's own budget by default.
        image_size: side of the input, pixels; by default the pictures' own, else each model's own.
        recipe: name or YAML file of everything else about training.
        batch_size: images a step; the recipe's by default.
        val_fraction: share held out of data that is not split yet.
        pretrained: start from published weights.
        seed: of the split, the weights and the order of the data.
        out: folder for the results; by default "runs/DATA-DATE", or the newest folder there that holds this very comparison. Under
            torchrun or SLURM it must be given and be shared; only the first process returns, the others leave with SystemExit(0).
        devices, num_nodes, strategy, accelerator: as Lightning Fabric takes them.
        progress: called with an `Event` whenever something happens.

    Raises:
        UsageError: unknown names (all at once), more than one budget, or a folder that holds another comparison or is in use.
        DataError: data that cannot be used; before any model is built.
        TrainingStopped: every model failed.
    """
    names = list(models) if models is not None else list(DEFAULT_MODELS)
    check_names(names)
    if out is None and started_together():
        raise UsageError("several processes were started, and all need the same folder: name it with out (--out), on a shared disk")
    settings = _recipe(recipe, pixels=image_size, seed=seed, steps=steps, epochs=epochs, minutes=minutes, batch_size=batch_size)
    images = open_data(data, seed=seed, val_fraction=val_fraction, image_size=image_size)
    _check_kind(names, images)
    if settings.image_size is None:
        size = images.image_size or (PICO_SIZE if models is None else None)
        settings = settings.model_copy(update=dict(image_size=size))
    where = Devices(devices, num_nodes, strategy, accelerator)
    main = is_main_process()
    plan = plan_of(images, names, settings, pretrained, processes=devices * num_nodes)
    folder = Path(out) if out is not None else default_folder(Path("runs"), images.name, plan)
    with lock_folder(folder) if main else nullcontext():
        if main:
            claim(folder, plan)
        job = _Job(images, names, settings, folder, pretrained, where, progress or (lambda event: None))
        trials, failures = job.run()
        if not main:
            raise SystemExit(0)  # a helper has nothing to return
        comparison = Comparison(
            folder=folder,
            data=images.name,
            images={"train": len(images.train), "val": len(images.val)},
            classes=list(images.classes),
            budget=settings.budget.model_dump(exclude_none=True),
            settings={
                "recipe": str(recipe),
                "batch_size": settings.batch_size,
                "seed": seed,
                "pretrained": pretrained,
                "devices": devices * num_nodes,
                "accelerator": accelerator,
                "measuring_batch": MEASURING_BATCH,
            },
            machine=describe_machine(),
            created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            trials=trials,
            failures=failures,
        )
        finish(comparison, images)
    return comparison


def finish(comparison: Comparison, images: ImageData) -> None:
    """Write the results, the best model's file and the page."""
    for bad in comparison.bad_files:
        log.warning("left out, because it cannot be read: %s (%s)", bad["path"], bad["reason"])
    comparison.write()
    best = comparison.best
    with atomic_path(comparison.folder / "best.safetensors") as temporary:
        shutil.copyfile(comparison.folder / best.file, temporary)
    write_report(comparison, pictures_of(comparison, images))


def pictures_of(comparison: Comparison, images: ImageData) -> list[Image.Image | None]:
    """The pictures of the best model's mistakes; None where one cannot be read any more."""
    return [_picture(images, mistake.index) for mistake in comparison.best.mistakes]


def _picture(images: ImageData, index: int) -> Image.Image | None:
    try:
        return still_of(images.val[index][0])
    except DataError:  # it could be read before; a page without it is still a page
        return None


def check_names(names: Sequence[str]) -> None:
    """Refuse names that no model has, all at once, before anything is built.

    Raises:
        UsageError: unknown, doubled or no names.
    """
    if not names:
        raise UsageError("no models to compare; give names such as swin_pico or timm/vit_pico ('vitarium models' lists ours)")
    problems = [f"{name!r} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for name in dict.fromkeys(names):
        try:
            _check_name(name)
        except VitariumError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))


def _check_kind(names: Sequence[str], images: ImageData) -> None:
    """Refuse models of clips on pictures and the other way round, before anything is trained.

    Raises:
        UsageError: with the names of those.
    """
    clips = holds_clips(images.train)
    if wrong := [name for name in names if sees_clips(name) != clips]:
        held, seen = ("clips", "single pictures") if clips else ("single pictures", "clips")
        raise UsageError(
            f"{images.name} holds {held}, and these models see {seen}: {', '.join(wrong)}; leave them out, or give them {seen}"
        )


def sees_clips(name: str) -> bool:
    """Whether a model, by its name, is one of clips."""
    if name.startswith(("timm/", "hf/")):
        return False
    family, variant = find_model(name.partition(".")[0])
    return family.variants[variant].get("frames") is not None


def _check_name(name: str) -> None:
    if name.startswith("timm/"):
        import timm

        from vitarium.catalog.foreign import TIMM_PICO

        bare = name.removeprefix("timm/")
        if bare not in TIMM_PICO and not timm.is_model(bare):
            raise UsageError(f"timm has no model {bare!r}{nearest(bare, [*TIMM_PICO, *timm.list_models()])}")
    elif not name.startswith("hf/"):  # those are looked up where they lie, when their turn comes
        find_model(name.partition(".")[0])


def _recipe(name: str | Path, *, pixels: int | None, seed: int, **given: Any) -> Recipe:
    """The recipe with what the caller set, checked together.

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


class _Job:
    """The models of one comparison, one after the other."""

    def __init__(
        self, images: ImageData, names: list[str], recipe: Recipe, folder: Path, pretrained: bool, devices: Devices, listener: Listener
    ):
        self.images, self.names, self.recipe, self.folder = images, names, recipe, folder
        self.pretrained, self.devices, self.listener = pretrained, devices, listener

    def run(self) -> tuple[list[Trial], list[Failure]]:
        """All trials; those of an earlier run are kept.

        Raises:
            UsageError, TrainingStopped: every model failed; the message has the reason of each.
            DataError, KeyboardInterrupt, OSError (disk full): what would stop the next model as well.
        """
        trials: list[Trial] = []
        errors: dict[str, Exception] = {}
        for position, name in enumerate(self.names):

            def tell(kind: Any, position: int = position, name: str = name, **values: Any) -> None:
                self.listener(Event(kind, name, position, len(self.names), **values))

            try:
                trial = self._one(name, tell)
            except (DataError, KeyboardInterrupt):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                errors[name] = error
                self._note(name, error)
                tell("failed", message=_reason(error))
            else:
                trials += [trial] if trial else []
        if len(errors) == len(self.names):
            kind = UsageError if all(isinstance(e, UsageError | InputError) for e in errors.values()) else TrainingStopped
            raise kind("no model could be compared:\n" + "\n".join(f"  {name}: {_reason(error)}" for name, error in errors.items()))
        return trials, [Failure(name, _reason(error)) for name, error in errors.items()]

    def _one(self, name: str, tell: Callable[..., None]) -> Trial | None:
        """One model; a finished one is read from its folder."""
        folder = self.folder / "models" / slug(name)
        result = folder / "result.json"
        if (there := read_json(result)) and (folder / MODEL).exists():
            trial = Trial.from_dict(there)
            tell("kept", step=trial.steps, steps=trial.steps, fraction=1.0, accuracy=trial.accuracy)
            return trial
        last: dict[str, Any] = {}

        def hear(progress: Progress) -> None:
            left = progress.seconds / progress.step * (progress.total_steps - progress.step) if progress.step else None
            last.update(step=progress.step, steps=progress.total_steps, fraction=progress.step / max(1, progress.total_steps))
            last.update(loss=progress.loss, accuracy=progress.metrics.get("accuracy"))
            tell("step", **last, seconds_left=left)

        tell("started")
        new = run_trial(
            name,
            self.images,
            self.recipe,
            folder,
            pretrained=self.pretrained,
            devices=self.devices,
            progress=hear,
            measuring=lambda: tell("measuring", **last),
        )
        if new:
            write_json(result, new.to_dict())
            tell("finished", **{**last, "step": new.steps, "steps": new.steps, "fraction": 1.0, "accuracy": new.accuracy})
        return new

    def _note(self, name: str, error: Exception) -> None:
        """The whole story of a failure, for who wants to know more than the message."""
        path = self.folder / "models" / slug(name) / "error.txt"
        log.warning("%s failed: %s (more in %s)", name, _reason(error), path)
        write_text(path, "".join(traceback.format_exception(error)))


def _reason(error: Exception) -> str:
    """A message for a table; other libraries' errors with their kind."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, VitariumError) else f"{type(error).__name__}: {text.splitlines()[0][:300]}"
