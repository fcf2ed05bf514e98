"""report.html: one page with all results of a comparison, which opens without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.files import write_text
from vitarium.pages import Cell, Column, Row, counted, embed_image, lasting, render_page, three
from vitarium.pages.page import HUES
from vitarium.reports.baselines import PIXELS
from vitarium.reports.data_section import describe
from vitarium.reports.doubts import possible_wrong_labels
from vitarium.reports.recommend import pareto_front
from vitarium.reports.results import Comparison, Trial
from vitarium.training.tasks import ConfusionData, GalleryData, Metric, ReportSection, TableData

if TYPE_CHECKING:
    from PIL import Image

COSTS = (
    ("latency_ms", "Latency", "Latency of one image, milliseconds", "~g"),
    ("peak_memory_mb", "Memory", "Peak memory of a forward pass, MB", "~g"),
    ("macs", "MACs", "Multiply-accumulates for one image", "~s"),
    ("params", "Parameters", "Parameters", "~s"),
)
"""Key, label of the switch, title of the axis, format of its ticks."""
COLUMNS = (
    ("latency_ms", "Latency", "ms", "ascending"),
    ("throughput", "Throughput", "images/s", "descending"),
    ("peak_memory_mb", "Memory", "MB", "ascending"),
    ("params", "Parameters", "", "ascending"),
    ("macs", "MACs", "", "ascending"),
    ("seconds", "Training", "s", "ascending"),
)
"""Key, label, unit, and which order puts the best first; the primary metric stands before them."""
RUNTIME_NAMES = {"compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Headers of the columns of runtimes."""
DRAWING_SIDE = 1040
"""Longest side of a drawing, pixels."""
Images = Mapping[int, "Image.Image | None"]
EMPTY: Images = {}


def write_report(comparison: Comparison, images: Images, examples: Images = EMPTY) -> None:
    """Write `comparison.report`.

    Args:
        images: held-out images of the task's galleries (see `sections_of`), by their place; None where one cannot be read any more.
        examples: training images of `comparison.inspection.examples`, likewise.
    """
    write_text(comparison.report, render(comparison, images, examples))


def sections_of(comparison: Comparison) -> list[ReportSection]:
    """Return what the task shows of the best model, and the labels that several models doubt."""
    best, doubts = comparison.best, possible_wrong_labels(comparison)
    shown = comparison.parsed_task().sections(best.name, best.extras, comparison.classes)
    return [*shown, doubts] if doubts else shown


def render(comparison: Comparison, images: Images, examples: Images = EMPTY) -> str:
    """Return the page as HTML. All values are escaped."""
    assets = resources.files("vitarium.reports") / "assets"
    template, css, js = ((assets / name).read_text(encoding="utf-8") for name in ("report.html.jinja", "report.css", "report.js"))
    values = {**_words(comparison), "sections": _sections(comparison, images), "drawings": _drawings(comparison)}
    values["shown_data"] = describe(comparison, examples)
    return render_page(template, kind="comparison", created=comparison.created, data=_data(comparison), css=css, js=js, **values)


# ---- the numbers of the plots


def _data(comparison: Comparison) -> dict[str, Any]:
    trials = comparison.trials
    metric, scores = comparison.metric, [t.score for t in trials]
    confusions = [section.counts for section in sections_of(comparison) if isinstance(section, ConfusionData)]
    return {
        "classes": comparison.classes,
        "confusion": confusions[0] if confusions else None,
        "metric": dict(key=metric.name, percent=metric.unit == "%", unit=metric.unit),
        "costs": [
            dict(key=key, title=title, format=form, front=pareto_front([getattr(t, key) for t in trials], scores, metric))
            for key, _, title, form in COSTS
        ],
        "models": [
            dict(
                name=t.name,
                colour=i % HUES,
                score=t.score,
                error=t.standard_error or 0,
                history=[{name: v for name, v in point.items() if math.isfinite(v)} for point in t.history],
                hover=_hover(t),
                **{key: getattr(t, key) for key, *_ in COSTS},
            )
            for i, t in enumerate(trials)
        ],
    }


def _hover(trial: Trial) -> list[str]:
    return [
        f"{trial.metric.label} {trial.metric.short(trial.score)}",
        f"latency {three(trial.latency_ms)} ms",
        f"throughput {counted(trial.throughput)} images/s",
        f"memory {three(trial.peak_memory_mb)} MB",
        f"{three(trial.params)} parameters, {three(trial.macs)} MACs",
    ]


# ---- the words


def _words(comparison: Comparison) -> dict[str, Any]:
    best, recommendation, metric = comparison.best, comparison.recommendation, comparison.metric
    chosen = next(t for t in comparison.trials if t.name == recommendation.model)
    count = len(comparison.trials) + len(comparison.failures)
    rows = _rows(comparison)
    order = {row["name"]: rank for rank, row in enumerate(comparison.table())}
    return dict(
        title=f"{count} models compared on {comparison.data}" if count > 1 else f"{best.name} on {comparison.data}",
        facts=[
            f"{comparison.images['train']:,} training images",
            f"{comparison.images['val']:,} held out",
            *([f"{len(comparison.classes)} classes"] if comparison.classes else []),
            f"input {_input(comparison)} pixels",
            f"{_budget(comparison)} each",
        ],
        recommendation=recommendation,
        recommended_is_not_best=chosen is not best,
        code=f"import vitarium\nmodel = vitarium.load({(comparison.folder / chosen.file).as_posix()!r})",
        figures=[
            dict(
                name=_title(metric),
                value=metric.number(chosen.score),
                unit=" ± ".join(filter(None, [metric.unit, _error(chosen)])),
            ),
            dict(name="Latency", value=three(chosen.latency_ms), unit="ms"),
            dict(name="Throughput", value=counted(chosen.throughput), unit="images/s"),
            dict(name="Peak memory", value=three(chosen.peak_memory_mb), unit="MB"),
            dict(name="Parameters", value=three(chosen.params), unit=""),
            dict(name="MACs", value=three(chosen.macs), unit=""),
        ],
        best=best,
        metric=dict(label=metric.label, title=_title(metric), max=metric.best == "max", spread=metric.share_of_images),
        most=_most(metric),
        training_loss=any("train_loss" in point for t in comparison.trials for point in t.history),
        failures=comparison.failures,
        bad_files=comparison.bad_files,
        warnings=[f"{text[0].upper()}{text[1:]}." for text in comparison.warnings],
        regression=[row for row in comparison.inspection.baselines if row["name"] == PIXELS],
        costs=[dict(key=key, label=label) for key, label, *_ in COSTS],
        columns=[
            Column("Model", numeric=False),
            Column(_title(metric), metric.unit, _first(metric), sorted=_first(metric)),
            *(Column(label, unit, first) for key, label, unit, first in columns_of(comparison)),
        ],
        rows=sorted(rows, key=lambda row: order[row.name]),
        in_order=rows,
        constant=_constant(comparison),
        method=_method(comparison),
    )


def _rows(comparison: Comparison) -> list[Row]:
    """Return a row a finished model, in the order asked for, which decides the colours."""
    trials, best = comparison.trials, comparison.best
    metric = comparison.metric
    columns = [("score", _first(metric)), *((key, first) for key, _, _, first in columns_of(comparison))]
    known = {key: [value for t in trials if (value := getattr(t, key)) is not None] for key, _ in columns}
    tops = {key: (min if first == "ascending" else max)(known[key], default=None) for key, first in columns}
    rows = []
    chosen = comparison.recommendation.model if comparison.recommendation.beats_baselines else None
    for place, trial in enumerate(trials):
        recommended = len(trials) > 1 and trial.name == chosen
        notes = {"score": f"± {_error(trial)}"} if _error(trial) else {}
        cells = [
            Cell(_value(trial, key), _cell(trial, key), notes.get(key, ""), len(trials) > 1 and getattr(trial, key) == tops[key])
            for key, _ in columns
        ]
        leads = len(trials) > 1 and trial is best
        marks = {"recommended": recommended, _most(metric): leads, "still improving": trial.still_improving is not None}
        marks["timed under load"] = trial.disturbed and not all(t.disturbed for t in trials)
        badges = [word for word, holds in marks.items() if holds]
        rows.append(Row(trial.name, cells, place % HUES, badges, recommended))
    return rows


def columns_of(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Return `COLUMNS`, with the latency of a runtime behind PyTorch's where one was asked for."""
    if comparison.runtime == "eager":
        return list(COLUMNS)
    first, *others = COLUMNS
    return [first, ("runtime_latency_ms", RUNTIME_NAMES.get(comparison.runtime, comparison.runtime), "ms", "ascending"), *others]


def _value(trial: Trial, key: str) -> float:
    """Return a number to sort by; a very large one where there is none."""
    value = getattr(trial, key)
    return 1e12 if value is None else value


def _cell(trial: Trial, key: str) -> str:
    value = getattr(trial, key)
    if value is None:
        return "-"
    if key == "score":
        return trial.metric.number(value)
    return f"{value:.0f}" if key == "seconds" else counted(value) if key == "throughput" else three(value)


def _constant(comparison: Comparison) -> list[Row]:
    """Return the rows of answers that no model gives, the best constant one first; their costs are empty."""
    costs = [Cell("", "") for _ in columns_of(comparison)]
    return [Row(name, [Cell(value, comparison.metric.number(value)), *costs]) for name, value in comparison.baselines().items()]


def _title(metric: Metric) -> str:
    """Return the metric's label with a capital first letter, unless a capital follows, as in "mIoU"."""
    label = metric.label
    return label if any(c.isupper() for c in label) else label[:1].upper() + label[1:]


def _most(metric: Metric) -> str:
    """Return the words for the model with the best score."""
    return "most accurate" if metric.share_of_images else f"best {metric.label}"


def _first(metric: Metric) -> str:
    return "descending" if metric.best == "max" else "ascending"


def _error(trial: Trial) -> str:
    """Return the standard error in points; "" where it is not known."""
    return "" if trial.standard_error is None else f"{100 * trial.standard_error:.1f}"


def _method(comparison: Comparison) -> list[dict[str, str]]:
    machine, settings = comparison.machine, comparison.settings
    counts = sorted({t.threads for t in comparison.trials})
    threads = f"{' or '.join(map(str, counts))} {'thread' if counts == [1] else 'threads'}"
    total, metric = sum(t.seconds for t in comparison.trials), comparison.metric
    calls = sorted({", ".join(t.inputs) for t in comparison.trials if len(t.inputs) > 1})
    one_call = f" Of one call of the model ({'; '.join(calls)})." if calls else ""
    chance = "differences below a standard error or two may be chance" if metric.share_of_images else "small differences may be chance"
    device = machine["accelerator"] if settings["accelerator"] != "cpu" and machine["accelerator"] else machine["processor"]
    together = " Several models ran at a time, and slowed each other down." if settings.get("at_a_time", 1) != 1 else ""
    several = f" {settings['devices']} processes." if settings["devices"] != 1 else ""
    notes = "".join(f" {note}." for note in comparison.notes)
    values = {
        "Training": f"{_budget(comparison)} for each model, recipe {settings['recipe']}, batches of {settings['batch_size']}, "
        f"{'from published weights' if settings['pretrained'] else 'from random weights'}.{several} {lasting(total)} in all.",
        "Data": f"{comparison.data}: {comparison.images['train']:,} training images; {metric.label} is measured on "
        f"{comparison.images['val']:,} held-out ones. Input of {_input(comparison)} pixels.{notes}",
        "Seed": f"{settings['seed']}, of the split, the initial weights and the order of the images. One run a model: {chance}.",
        "Latency": "time of one image at batch 1 in evaluation mode, after a warm-up: the best of several medians."
        + one_call
        + together
        + _deployed(comparison),
        "Throughput and memory": f"at {settings['measuring_batch']} images a batch; throughput is the best of several medians, memory is "
        "weights, images and activations alive at once in a forward pass.",
        "MACs": "multiply-accumulates for one image, counted in the operations that really run.",
        "Recommendation": "of the models within one standard error of the most accurate, the one with the lowest latency, "
        "if it is clearly faster; else the most accurate."
        if metric.share_of_images
        else f"the model with the best {metric.label}; of equals the one with the lowest latency.",
        **(dict(Baselines=_rule_of_baselines(metric)) if comparison.baselines() else {}),
        "Machine": _machines(comparison) or f"{device}, {machine['cores']} cores, {threads} for PyTorch; {machine['system']}.",
        "Versions": f"Vitarium {machine['vitarium']}, PyTorch {machine['torch']}, timm {machine['timm']}, Python {machine['python']}.",
    }
    return [dict(name=name, value=value[0].upper() + value[1:] if name != "Data" else value) for name, value in values.items()]


def _rule_of_baselines(metric: Metric) -> str:
    """Return a sentence on answers that no model gives."""
    margin = " by more than one standard error of the difference" if metric.share_of_images else ""
    return f"no model is recommended unless it is better than the answers that no model gives{margin}."


def _deployed(comparison: Comparison) -> str:
    """Return a sentence on the column of a runtime; "" without one."""
    name = RUNTIME_NAMES.get(comparison.runtime)
    if name is None:
        return ""
    every = all(trial.runtime_latency_ms is not None for trial in comparison.trials)
    decides = "its latency decides the recommendation" if every else "since it does not take every model, PyTorch's latency decides"
    return f" In the column {name}, it executes the saved model; {decides}."


def _input(comparison: Comparison) -> str:
    """Return the sides of the models' inputs: "32x32", or "16x16 to 32x32"."""
    sides = sorted({t.image_size for t in comparison.trials})
    return " to ".join(f"{side}x{side}" for side in dict.fromkeys((sides[0], sides[-1])))


def _machines(comparison: Comparison) -> str:
    """Return which model ran where, if that was on different kinds of machine; "" else."""
    devices = sorted({t.device for t in comparison.trials if t.device})
    if len(devices) < 2:
        return ""
    where = "; ".join(f"{device}: {', '.join(t.name for t in comparison.trials if t.device == device)}" for device in devices)
    return f"models ran on different machines, so that latency and throughput compare only within one of them. {where}."


def _budget(comparison: Comparison) -> str:
    ((unit, amount),) = comparison.budget.items()
    return f"{amount:,} {unit if amount != 1 else unit.rstrip('s')}"


# ---- what the task shows of the best model


def _sections(comparison: Comparison, images: Images) -> list[dict[str, Any]]:
    """Return the task's sections with their images, each with its kind: "confusion", "gallery" or "table"."""
    found: list[dict[str, Any]] = []
    for section in sections_of(comparison):
        entry: dict[str, Any] = dict(title=section.title)
        match section:
            case ConfusionData():
                entry |= dict(kind="confusion", words=section.words)
            case GalleryData():
                shown = [dict(vars(one), image=embed_image(images.get(one.index))) for one in section.images]
                entry |= dict(kind="gallery", words=section.words, images=shown)
            case TableData():
                entry |= section.values()
        found.append(entry)
    return found


def _drawings(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the drawings of the best model's last evaluation (`pictures/NAME-STEP.png` in its folder); none where they are gone."""
    from PIL import Image

    latest = {path.stem.rpartition("-")[0]: path for path in sorted(_folder(comparison).glob("pictures/*.png"))}
    found = []
    for name, path in latest.items():
        try:
            with Image.open(path) as drawing:
                found.append(dict(name=name.replace("_", " "), **embed_image(drawing, side=DRAWING_SIDE)))
        except OSError:
            continue
    return found


def _folder(comparison: Comparison) -> Path:
    """Return the folder of the best model."""
    return (comparison.folder / comparison.best.file).parent
