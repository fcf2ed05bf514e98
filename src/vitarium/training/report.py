"""Pages of a run, each one HTML file that opens without a network: report.html after a training, find_lr.html after a sweep of rates."""

from __future__ import annotations

import datetime
import logging
import math
import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import DataError
from vitarium.files import write_text
from vitarium.pages import embed_image, lasting, listed, render_page
from vitarium.training.lengths import Budget
from vitarium.training.recipe import Recipe
from vitarium.training.tasks import ConfusionData, GalleryData, ReportSection, TableData, Task

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from vitarium.data import ImageData
    from vitarium.training.fitting import FitResult
    from vitarium.training.rate_finder import Sweep

PAGE, RATE_PAGE = "report.html", "find_lr.html"
MOST_CLASSES = 40
"""Largest number of classes of which the whole confusion matrix is shown; of more, the most frequent confusions."""
MOST_CONFUSIONS, MOST_FIGURES = 20, 6
"""Largest numbers of confusions in that table, and of metrics at the top of the page."""

log = logging.getLogger("vitarium")


def write_run_report(
    folder: Path, name: str, model: nn.Module, task: Task, data: ImageData, recipe: Recipe, result: FitResult
) -> Path | None:
    """Write report.html into the folder of a run: curves, and what the task shows of the trained model.

    A run that had ended before keeps its page. A failure is a warning: the model is trained and saved.

    Args:
        name: of the model.
        model: trained, in eval mode.

    Returns:
        the page; None if it could not be written.
    """
    page = folder / PAGE
    if result.earlier == result.steps and page.exists():
        return page
    try:
        extras = task.extras(model, data, result.metrics)
        sections = task.sections(name, extras, list(data.classes))
        write_text(page, render_run(folder, name, task, data, recipe, result, sections))
    except Exception as error:  # each task measures and draws by its own code, and memory or the disk may be full
        log.warning("the page of the run cannot be written (%s: %s); the model is complete", type(error).__name__, error)
        return None
    return page


def render_run(
    folder: Path, name: str, task: Task, data: ImageData, recipe: Recipe, result: FitResult, sections: Sequence[ReportSection]
) -> str:
    """Return report.html as text."""
    plots = curves(task, result)
    metric, value = task.primary, result.metrics.get(task.primary.name)
    kept = f", of step {result.best_step}, the best evaluation" if result.best_step is not None else ""
    verdict = f"{name}: {metric.label} {metric.short(value)}{kept}." if isinstance(value, int | float) else f"{name} was trained."
    stopped = f" of at most {_length(recipe.budget)}, stopped early" if result.stopped_early else ""
    return _render(
        "run",
        kind="training",
        title=f"{name} on {data.name}",
        facts=[
            f"{len(data.train):,} training images",
            f"{len(data.val):,} held out",
            *([f"{len(data.classes)} classes"] if data.classes else []),
            f"{result.steps:,} steps in {lasting(result.seconds)}{stopped}",
        ],
        data={"plots": plots},
        drawn=plots,
        verdict=verdict,
        figures=[dict(name=key.capitalize(), **_parts(text)) for key, text in task.texts(result.metrics).items()][:MOST_FIGURES],
        code=f"import vitarium\nmodel = vitarium.load({(folder / 'model.safetensors').as_posix()!r})",
        sections=[*(_values(section, data) for section in sections), _values(evaluations(task, result), data)],
        method=_method(data, recipe, result),
    )


def write_rate_page(folder: Path, name: str, data: str, sweep: Sweep, recipe: Recipe, use: str) -> Path:
    """Write find_lr.html into a folder, and return its path.

    Args:
        folder: of the run.
        name, data: of the model and the data.
        sweep: the losses by rate.
        recipe: of the sweep.
        use: the command that trains with the suggestion.

    Raises:
        OSError: it cannot be written.
    """
    lines = [dict(name="loss of a step", x=sweep.rates, y=sweep.losses, faint=True), dict(name="mean", x=sweep.rates, y=sweep.means)]
    marks = [dict(x=sweep.suggestion, text=f"found: {sweep.suggestion:.2g}")]
    if sweep.rates[0] <= recipe.optimizer.lr <= sweep.rates[-1]:
        marks.append(dict(x=recipe.optimizer.lr, text=f"the recipe's: {recipe.optimizer.lr:g}", faint=True))
    shown = useful_range(sweep)
    plot = dict(id="sweep", axis="learning rate (optimizer.lr)", vertical="loss", range=shown, lines=lines, marks=marks, percent=False)
    plot |= dict(format=".4~g", logarithmic=True)
    above = [loss for loss in sweep.losses if loss > shown[1]]
    steps = f"{len(above)} step{'' if len(above) == 1 else 's'}"
    clipped = f"The vertical axis shows the useful range; {steps} with losses up to {max(above):.4g} lie above it." if above else ""
    doubt = "" if sweep.clear else " The loss did not fall clearly during the sweep, so that this rate may be chance."
    text = _render(
        "rate",
        kind="learning rates",
        title=f"A learning rate for {name} on {data}",
        facts=[f"{len(sweep.rates)} steps", f"batches of {recipe.batch_size}", f"optimizer {recipe.optimizer.name}"],
        data={"plots": [plot]},
        verdict=f"Learning rate {sweep.suggestion:.2g}; the recipe has {recipe.optimizer.lr:g}.{doubt}",
        use=use,
        clipped=clipped,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RATE_PAGE, text)
    return folder / RATE_PAGE


def useful_range(sweep: Sweep) -> list[float]:
    """Return the least and the largest loss that the plot of a sweep shows.

    The losses up to the minimum of their mean count, without the largest twentieth: one step that diverges, of a loss a hundred times as
    large, would leave a flat line of all others.
    """
    useful = sweep.losses[: max(2, sweep.means.index(min(sweep.means)) + 1)]
    low, high = min(sweep.losses), max(sweep.losses[0], statistics.quantiles(useful, n=20, method="inclusive")[-1])
    pad = 0.1 * (high - low) or 0.1
    return [low - pad, high + pad]


def _render(template: str, **values: Any) -> str:
    """Return a page of this package; `data["plots"]` are its plots."""
    assets = resources.files("vitarium.training") / "assets"
    text, css, js = ((assets / name).read_text(encoding="utf-8") for name in (f"{template}.html.jinja", "run.css", "run.js"))
    created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    plots = bool(values["data"]["plots"])
    return render_page(text, created=created, css=css, js=js if plots else "", plots=plots, **values)


def curves(task: Task, result: FitResult) -> list[dict[str, Any]]:
    """Return the plots of the evaluations: primary metric, and training loss (with the held-out loss where the task has one)."""
    history, metric = result.history, task.primary
    marks = [dict(x=result.best_step, text="kept")] if result.best_step is not None else []
    losses = [
        _line(history, key, name)
        for key, name in (("train_loss", "training"), ("loss", "held out"))
        if any(key in entry for entry in history)
    ]
    plots = []
    if metric.name != "loss" and any(metric.name in entry for entry in history):
        line = _line(history, metric.name, metric.label)
        percent = metric.unit == "%"
        plots.append(dict(id="score", title=f"{metric.label.capitalize()} on held-out images", lines=[line], marks=marks, percent=percent))
    if any(line["x"] for line in losses):
        plots.append(dict(id="loss", title="Loss", lines=losses, marks=[], percent=False))
    return [dict(plot, axis="step", format=".1%" if plot["percent"] else ".4~g", logarithmic=False) for plot in plots]


def _line(history: Sequence[dict[str, Any]], key: str, name: str) -> dict[str, Any]:
    points = [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key, math.nan))]
    return dict(name=name, x=[step for step, _ in points], y=[value for _, value in points])


def evaluations(task: Task, result: FitResult) -> TableData:
    """Return the evaluations as a table."""
    metric = task.primary
    names = [key for key in ("train_loss", "loss", metric.name) if any(key in entry for entry in result.history)]
    rows = [
        [
            f"{entry['step']:,}",
            f"{entry['epoch']:.2f}",
            *(_number(entry.get(key), percent=key == metric.name and metric.unit == "%") for key in dict.fromkeys(names)),
        ]
        for entry in result.history
    ]
    heads = {"train_loss": "training loss", "loss": "held-out loss"}
    return TableData(
        "Evaluations", [">step", ">epoch", *(f">{heads.get(key, key.replace('_', ' '))}" for key in dict.fromkeys(names))], rows
    )


def _number(value: float | None, *, percent: bool) -> str:
    return "" if value is None else f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _values(section: ReportSection, data: ImageData) -> dict[str, Any]:
    """Return a section as values of the template, with its kind: "confusion", "gallery" or "table"."""
    match section:
        case ConfusionData() if len(section.names) > MOST_CLASSES:
            return _values(frequent_confusions(section), data)
        case ConfusionData():
            return dict(kind="confusion", title=section.title, words=section.words, names=section.names, rows=_confusion_rows(section))
        case GalleryData():
            shown = [dict(vars(one), image=embed_image(_image(data, one.index))) for one in section.images]
            return dict(kind="gallery", title=section.title, words=section.words, images=shown)
        case TableData():
            return section.values()


def _confusion_rows(section: ConfusionData) -> list[dict[str, Any]]:
    """Return the rows of a confusion matrix; `share` is the strength of a cell's colour, percent."""
    rows = []
    for true, counts in enumerate(section.counts):
        total = sum(counts)
        cells = [
            dict(
                count=count,
                strong=true == predicted and 2 * count > total,
                kind="" if not count else ("right" if true == predicted else "wrong"),
                share=round(100 * count / total if true == predicted else min(100, 15 + 250 * count / total)) if count else 0,
            )
            for predicted, count in enumerate(counts)
        ]
        rows.append(dict(name=section.names[true], total=total, cells=cells))
    return rows


def frequent_confusions(section: ConfusionData) -> TableData:
    """Return the most frequent confusions of a large matrix as a table."""
    found = [(n, true, guess) for true, row in enumerate(section.counts) for guess, n in enumerate(row) if n and true != guess]
    rows = [
        [section.names[true], section.names[guess], f"{n} of {sum(section.counts[true])}"]
        for n, true, guess in sorted(found, key=lambda entry: (-entry[0], entry[1:]))[:MOST_CONFUSIONS]
    ]
    return TableData(f"{section.title}: the most frequent", ["true", "predicted", ">images"], rows)


def _image(data: ImageData, index: int) -> Image.Image | None:
    from vitarium.data.clips import still_of

    try:
        return still_of(data.val[index][0])
    except DataError:  # it could be read before
        return None


def _parts(text: str) -> dict[str, str]:
    """Split a value from its unit: "98.3 %" -> "98.3", "%"."""
    number, _, unit = text.partition(" ")
    return dict(value=number, unit=unit)


def _length(budget: Budget) -> str:
    ((unit, amount),) = budget.model_dump(exclude_none=True).items()
    return f"{amount:,g} {unit}"


def _method(data: ImageData, recipe: Recipe, result: FitResult) -> list[dict[str, str]]:
    optimizer, average = recipe.optimizer, recipe.ema
    values = {
        "Length": f"{_length(recipe.budget)}; {result.steps:,} steps were made"
        + (f", and {result.skipped} skipped whose loss or gradient was not finite" if result.skipped else ""),
        "Batch": f"{recipe.batch_size} images"
        + (f" x {recipe.accumulate} accumulated" if recipe.accumulate > 1 else "")
        + f"; order: {recipe.sampling}",
        "Optimizer": f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}; schedule {recipe.schedule.name}",
        "Average": f"moving average of the weights, decay {average.decay:g}" if average else "none: the last weights",
        "Input": f"{recipe.image_size} x {recipe.image_size} pixels" if recipe.image_size else "the model's own size",
        "Objective": listed(recipe.objective),
        "Seed": str(recipe.seed),
        "Images left out": f"{len(result.bad_files)} that could not be read, listed in bad_files.txt" if result.bad_files else "none",
    }
    return [dict(name=name, value=value) for name, value in values.items()] + [dict(name="Notes", value=note) for note in data.notes]
