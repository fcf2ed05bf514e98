"""Train several models under the same budget, measure them, and recommend one."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ParamSpec

from vitarium.errors import UsageError, WriteError, nearest
from vitarium.numbers import short
from vitarium.reports.results import Comparison
from vitarium.training.tasks.base import Metric, TableData
from vitarium.verbs.opening import Notify, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from vitarium.engine import Engine
    from vitarium.reports.events import Listener

P = ParamSpec("P")


class Compared(Result, Comparison):
    """A comparison (see `vitarium.reports.results.Comparison`) as the result of a verb."""

    def facts(self) -> dict[str, Any]:
        rows: dict[str, Any] = {"recommendation": self.recommendation.sentence}
        rows |= {"report": self.report} if self.report.exists() else {}
        rows |= {"warnings": "; ".join(self.warnings)} if self.warnings else {}
        return rows | ({"failed": ", ".join(failure.name for failure in self.failures)} if self.failures else {})

    def tables(self) -> list[TableData]:
        return [TableData("", headers(self), all_cells(self))]

    def to_dict(self) -> dict[str, Any]:
        return Comparison.to_dict(self)


def keeping_result(verb: Callable[P, Compared]) -> Callable[P, Compared]:
    """Return `compare` with the comparison in the error of a full disk as its result (see `vitarium.verbs.result.kept`)."""

    @functools.wraps(verb)
    def kept(*args: P.args, **options: P.kwargs) -> Compared:
        try:
            return verb(*args, **options)
        except WriteError as error:
            if isinstance(error.result, Comparison):
                error.result = as_result(error.result)
            raise

    return kept


def as_result(found: Comparison) -> Compared:
    """Return a comparison as the result of a verb."""
    return Compared(**{field.name: getattr(found, field.name) for field in fields(Comparison)})


@keeping_result
def compare(
    data: str | os.PathLike[str] | None = None,
    models: str | Sequence[str] | None = None,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    recipe: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    val_fraction: float = 0.2,
    pretrained: bool = False,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    runtime: str = "eager",
    progress: Listener | None = None,
    notify: Notify = quiet,
) -> Compared:
    """Train models on your images under the same budget, measure them, and recommend one; results and an HTML report go to a folder.

    The recipe's task decides what is learned and by which metric the models are compared: accuracy, PQ, PSNR, AUROC, ... An interrupted
    comparison continues when the same call is made again, on either engine.

    Args:
        data: as for `vitarium.open_data`; None: the recipe's, "fashion" without a recipe, else the default of its task.
        models: names and patterns, as "swin_pico,*_pico" or ["swin_pico", "timm/vit_pico"]; a pattern stands for the models of the
            recipe's task. None: six small classifiers of different families, or the recipe's model for another task.
        steps, epochs, minutes: of training each model, at most one of them; None: the recipe's budget.
        image_size: side of the input, pixels; None: the images' own, else each model's own.
        recipe: a recipe's name or a YAML file; None: "fashion" for these images and without data, else "pico".
        batch_size: images a step; None: the recipe's.
        val_fraction: share held out of data that has no val/ part.
        pretrained: start from published weights.
        seed: of the split, the weights and the order of the images.
        out: folder for results and report; None: runs/DATA-DATE.
        devices, num_nodes, strategy, accelerator: of the training of one model, see `vitarium.training.fit`.
        engine: "local", this machine; "ray", a Ray cluster; or an `engine.Engine`.
        address: of a running Ray cluster, "auto" or "HOST:PORT".
        jobs: models at a time; None: 1 locally, as many as the cluster allows under Ray.
        runtime: "compile", "onnxruntime" or "openvino": the trained models are timed with it as well, and recommended by that latency.
        progress: called with each `vitarium.reports.events.Event`.
        notify: called with what is known before the training: duplicates in the data, the expected time, and ways to shorten a long one.

    Raises:
        UsageError: unknown names (all at once), a pattern that nothing matches, more than one budget, or a folder of another comparison.
        DataError: data that cannot be used; before any model is built.
        TrainingStopped: every model failed.
        WriteError: the disk is full; `error.result` is the comparison of the models that were measured, if any.
        MissingExtra: engine="ray" without Ray, or a runtime that is not installed.
    """
    from vitarium.reports.compare import compare as run
    from vitarium.reports.names import default_recipe

    recipe = default_recipe(data) if recipe is None else recipe
    found = run(
        None if data is None else os.fspath(data),
        None if models is None else chosen(models, os.fspath(recipe)),
        steps=steps,
        epochs=epochs,
        minutes=minutes,
        image_size=image_size,
        recipe=os.fspath(recipe),
        batch_size=batch_size,
        val_fraction=val_fraction,
        pretrained=pretrained,
        seed=seed,
        out=None if out is None else os.fspath(out),
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        accelerator=accelerator,
        engine=engine,
        address=address,
        jobs=jobs,
        runtime=runtime,
        progress=progress,
        notify=notify,
    )
    return as_result(found)


def chosen(models: str | Sequence[str], recipe: str = "pico") -> list[str]:
    """Return the names of a list, each once. A pattern stands for the models of the recipe's task that it matches; of clips, if no model
    of images matches.

    Args:
        models: names and patterns, in a sequence or with commas.
        recipe: name or YAML file.

    Raises:
        UsageError: an empty list, or a pattern that nothing matches.
    """
    names: list[str] = []
    for part in filter(None, map(str.strip, models.split(",") if isinstance(models, str) else models)):
        if any(c.isspace() for c in part):
            raise UsageError(f"--models takes names separated by commas: --models {','.join(part.split())}, got {part!r}")
        matches = models_like(part, recipe) if any(c in part for c in "*?[") else [part]
        if not matches:
            raise UsageError(
                f"no model matches {part!r} for the task of the recipe {recipe}{near_pattern(part, recipe)} ('vitarium models' lists all)"
            )
        names += [name for name in matches if name not in names]
    if not names:
        raise UsageError("--models names no model; write names with commas, such as swin_pico,timm/vit_pico")
    return names


def near_pattern(pattern: str, recipe: str) -> str:
    """Return "; did you mean ...?" with names of the recipe's task that are like a pattern without its wildcards; "" if none is."""
    names = models_like("*", recipe)
    letters = re.sub(r"\[[^]]*\]|[*?]", "", pattern).strip("_-/.")
    return nearest(letters, names) or nearest(letters, sorted({name.partition("_")[0] for name in names}))


def models_like(pattern: str, recipe: str) -> list[str]:
    """Return the names of the models of a recipe's task that a shell pattern matches: those of images, or else those of clips."""
    from vitarium.catalog.search import find_models
    from vitarium.reports.names import trains_like
    from vitarium.training import load_recipe

    found, settings = find_models(pattern, timm=True), load_recipe(recipe)
    fitting = {name for name in {row["learner"] for row in found} if trains_like(settings, name)}
    rows = [row for row in found if row["learner"] in fitting]
    return [row["name"] for row in rows if row["frames"] is None] or [row["name"] for row in rows]


def headers(comparison: Comparison) -> list[str]:
    """Return the headers of a table of the models; ">" aligns to the right, "~" marks names that may be cut."""
    deployed = [] if comparison.runtime == "eager" else [f">{comparison.runtime}"]
    return ["~model", f">{comparison.metric.label}", ">latency", *deployed, ">images/s", ">memory", ">params", ">MACs"]


def all_cells(comparison: Comparison) -> list[list[str]]:
    """Return the rows of a table of the models: answers that no model gives, such as a constant one, then the models, the best first."""
    return baselines(comparison) + [cells(row, comparison.metric) for row in comparison.table()]


def baselines(comparison: Comparison) -> list[list[str]]:
    """Return the rows of answers that no model gives: the best constant one, and logistic regression on the pixels; none without any."""
    return [
        [name, comparison.metric.short(value), *[""] * (len(headers(comparison)) - 2)] for name, value in comparison.baselines().items()
    ]


def cells(row: dict[str, Any], metric: Metric) -> list[str]:
    """Return a row of `Comparison.table` as text with units."""
    times = [row["runtime_latency_ms"]] if "runtime_latency_ms" in row else []
    deployed = ["-" if value is None else f"{value:.2f} ms" for value in times]
    return [
        row["name"],
        metric.short(row[metric.name]),
        f"{row['latency_ms']:.2f} ms",
        *deployed,
        short(row["throughput"]),
        f"{row['peak_memory_mb']:.1f} MB",
        short(row["params"]),
        short(row["macs"]),
    ]
