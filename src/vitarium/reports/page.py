"""report.html: one page with all results of a comparison, which opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from vitarium.files import write_text
from vitarium.pages import Cell, Column, Row, counted, embed_image, lasting, percent, render_page, three
from vitarium.pages.page import HUES
from vitarium.reports.recommend import pareto_front
from vitarium.reports.results import Comparison, Trial

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
    ("accuracy", "Accuracy", "%", "descending"),
    ("latency_ms", "Latency", "ms", "ascending"),
    ("throughput", "Throughput", "images/s", "descending"),
    ("peak_memory_mb", "Memory", "MB", "ascending"),
    ("params", "Parameters", "", "ascending"),
    ("macs", "MACs", "", "ascending"),
    ("seconds", "Training", "s", "ascending"),
)
"""Key, label, unit, and which order puts the best first."""


def write_report(comparison: Comparison, images: Sequence[Image.Image | None]) -> None:
    """Write `comparison.report`.

    Args:
        images: of the best model's mistakes, in their order; None where one cannot be read any more.
    """
    write_text(comparison.report, render(comparison, images))


def render(comparison: Comparison, images: Sequence[Image.Image | None]) -> str:
    """Return the page as HTML. All values are escaped."""
    assets = resources.files("vitarium.reports") / "assets"
    template, css, js = ((assets / name).read_text(encoding="utf-8") for name in ("report.html.jinja", "report.css", "report.js"))
    values = {**_words(comparison), **_gallery(comparison, images)}
    return render_page(template, kind="comparison", created=comparison.created, data=_data(comparison), css=css, js=js, **values)


# ---- the numbers of the plots


def _data(comparison: Comparison) -> dict[str, Any]:
    trials = comparison.trials
    accuracies = [t.accuracy for t in trials]
    return {
        "classes": comparison.classes,
        "confusion": comparison.best.confusion,
        "costs": [
            dict(key=key, title=title, format=form, front=pareto_front([getattr(t, key) for t in trials], accuracies))
            for key, _, title, form in COSTS
        ],
        "models": [
            dict(
                name=t.name,
                colour=i % HUES,
                accuracy=t.accuracy,
                error=t.standard_error,
                history=t.history,
                hover=_hover(t),
                **{key: getattr(t, key) for key, *_ in COSTS},
            )
            for i, t in enumerate(trials)
        ],
    }


def _hover(trial: Trial) -> list[str]:
    return [
        f"accuracy {percent(trial.accuracy)}",
        f"latency {three(trial.latency_ms)} ms",
        f"throughput {counted(trial.throughput)} images/s",
        f"memory {three(trial.peak_memory_mb)} MB",
        f"{three(trial.params)} parameters, {three(trial.macs)} MACs",
    ]


# ---- the words


def _words(comparison: Comparison) -> dict[str, Any]:
    best, recommendation = comparison.best, comparison.recommendation
    chosen = next(t for t in comparison.trials if t.name == recommendation.model)
    count = len(comparison.trials) + len(comparison.failures)
    rows = _rows(comparison)
    order = {row["name"]: rank for rank, row in enumerate(comparison.table())}
    return dict(
        title=f"{count} models compared on {comparison.data}" if count > 1 else f"{best.name} on {comparison.data}",
        facts=[
            f"{comparison.images['train']:,} training images",
            f"{comparison.images['val']:,} held out",
            f"{len(comparison.classes)} classes",
            f"{_budget(comparison)} each",
        ],
        recommendation=recommendation,
        recommended_file=(comparison.folder / chosen.file).as_posix(),
        recommended_is_not_best=chosen is not best,
        figures=[
            dict(name="Accuracy", value=f"{100 * chosen.accuracy:.1f}", unit=f"% ± {100 * chosen.standard_error:.1f}"),
            dict(name="Latency", value=three(chosen.latency_ms), unit="ms"),
            dict(name="Throughput", value=counted(chosen.throughput), unit="images/s"),
            dict(name="Peak memory", value=three(chosen.peak_memory_mb), unit="MB"),
            dict(name="Parameters", value=three(chosen.params), unit=""),
            dict(name="MACs", value=three(chosen.macs), unit=""),
        ],
        best=best,
        failures=comparison.failures,
        bad_files=comparison.bad_files,
        costs=[dict(key=key, label=label) for key, label, *_ in COSTS],
        columns=[
            Column("Model", numeric=False),
            *(Column(label, unit, first, sorted="descending" if key == "accuracy" else "") for key, label, unit, first in COLUMNS),
        ],
        rows=sorted(rows, key=lambda row: order[row.name]),
        in_order=rows,
        confusion_words=_confusion_words(comparison),
        method=_method(comparison),
    )


def _rows(comparison: Comparison) -> list[Row]:
    """Return a row a finished model, in the order asked for, which decides the colours."""
    trials, best = comparison.trials, comparison.best
    tops = {key: (min if first == "ascending" else max)(getattr(t, key) for t in trials) for key, _, _, first in COLUMNS}
    rows = []
    for place, trial in enumerate(trials):
        recommended = trial.name == comparison.recommendation.model
        notes = {"accuracy": f"± {100 * trial.standard_error:.1f}"}
        cells = [
            Cell(getattr(trial, key), _cell(trial, key), notes.get(key, ""), len(trials) > 1 and getattr(trial, key) == tops[key])
            for key, *_ in COLUMNS
        ]
        badges = [word for word, holds in (("recommended", recommended), ("most accurate", trial is best)) if holds]
        rows.append(Row(trial.name, cells, place % HUES, badges, recommended))
    return rows


def _cell(trial: Trial, key: str) -> str:
    value = getattr(trial, key)
    if key == "accuracy":
        return f"{100 * value:.1f}"
    return f"{value:.0f}" if key == "seconds" else counted(value) if key == "throughput" else three(value)


def _confusion_words(comparison: Comparison) -> str:
    """Return the number of errors and the most frequent confusion as a sentence."""
    matrix, classes = comparison.best.confusion, comparison.classes
    wrong = [(n, t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) if t != p and n]
    if not wrong:
        return "Nothing: every held-out image was classified correctly."
    n, true, predicted = max(wrong, key=lambda entry: entry[0])
    total = sum(entry[0] for entry in wrong)
    seen = sum(map(sum, matrix))
    most = f"; most often {classes[true]} was taken for {classes[predicted]} ({n} of {sum(matrix[true])})" if n > 1 else ""
    return f"{total} of {seen} held-out images were classified wrongly{most}."


def _method(comparison: Comparison) -> list[dict[str, str]]:
    machine, settings = comparison.machine, comparison.settings
    counts = sorted({t.threads for t in comparison.trials})
    threads = f"{' or '.join(map(str, counts))} {'thread' if counts == [1] else 'threads'}"
    sizes = sorted({t.image_size for t in comparison.trials})
    total = sum(t.seconds for t in comparison.trials)
    device = machine["accelerator"] if settings["accelerator"] != "cpu" and machine["accelerator"] else machine["processor"]
    together = " Several models ran at a time, and slowed each other down." if settings.get("at_a_time", 1) != 1 else ""
    several = f" {settings['devices']} processes." if settings["devices"] != 1 else ""
    values = {
        "Training": f"{_budget(comparison)} for each model, recipe {settings['recipe']}, batches of {settings['batch_size']}, "
        f"{'from published weights' if settings['pretrained'] else 'from random weights'}.{several} {lasting(total)} in all.",
        "Data": f"{comparison.data}: {comparison.images['train']:,} training images; accuracy is measured on {comparison.images['val']:,} "
        f"held-out ones. Input of {' or '.join(f'{s}x{s}' for s in sizes)} pixels.",
        "Seed": f"{settings['seed']}, of the split, the initial weights and the order of the images. One run a model: differences below a "
        "standard error or two may be chance.",
        "Latency": "time of one image at batch 1 in evaluation mode, after a warm-up: the best of several medians." + together,
        "Throughput and memory": f"at {settings['measuring_batch']} images a batch; throughput is the best of several medians, memory is "
        "weights, images and activations alive at once in a forward pass.",
        "MACs": "multiply-accumulates for one image, counted in the operations that really run.",
        "Recommendation": "of the models within one standard error of the most accurate, the one with the lowest latency, "
        "if it is clearly faster; else the most accurate.",
        "Machine": _machines(comparison) or f"{device}, {machine['cores']} cores, {threads} for PyTorch; {machine['system']}.",
        "Versions": f"Vitarium {machine['vitarium']}, PyTorch {machine['torch']}, timm {machine['timm']}, Python {machine['python']}.",
    }
    return [dict(name=name, value=value[0].upper() + value[1:] if name != "Data" else value) for name, value in values.items()]


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


# ---- the mistakes


def _gallery(comparison: Comparison, images: Sequence[Image.Image | None]) -> dict[str, Any]:
    best, classes = comparison.best, comparison.classes
    mistakes = [
        dict(
            true=classes[m.true],
            predicted=classes[m.predicted],
            confidence=f"{100 * m.confidence:.0f} %",
            image=m.image,
            **embed_image(image),
        )
        for m, image in zip(best.mistakes, images, strict=True)
    ]
    total = sum(n for t, row in enumerate(best.confusion) for p, n in enumerate(row) if t != p)
    which = f"The {len(mistakes)} most confident of {total}" if total > len(mistakes) else "All of them, the most confident first"
    return dict(mistakes=mistakes, mistakes_words=f"{which}: prediction with its probability, and the true class.")
