"""report.html: one page with everything in it, that opens from a disk without a network.

Words, table and pictures are plain HTML made here; the charts are drawn by assets/report.js from the numbers embedded in the page.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import vitarium
from vitarium.files import write_text
from vitarium.reports.recommend import pareto_front
from vitarium.reports.results import Comparison, Trial

if TYPE_CHECKING:
    from PIL import Image

COLOURS = 8
"""Hues of report.css; later models begin again, with dashed lines."""
PICTURE_SIDE = 160
"""Larger pictures are scaled down to this, pixels."""
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


def write_report(comparison: Comparison, pictures: Sequence[Image.Image | None]) -> None:
    """Write `comparison.report`.

    Args:
        pictures: of the best model's mistakes, in their order; None where one cannot be read any more.
    """
    write_text(comparison.report, render(comparison, pictures))


def render(comparison: Comparison, pictures: Sequence[Image.Image | None]) -> str:
    """The page as text. Everything that comes from outside is escaped."""
    from jinja2 import DictLoader, Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    assets = resources.files("vitarium.reports") / "assets"
    names = ("report.html.jinja", "report.css", "report.js")
    html, css, js = ((assets / name).read_text(encoding="utf-8") for name in names)
    environment = Environment(loader=DictLoader({"page": html}), autoescape=True, trim_blocks=False)
    code = {name: Markup(text) for name, text in dict(css=css, js=js, plotly=get_plotlyjs(), payload=_payload(comparison)).items()}
    return environment.get_template("page").render(**_words(comparison), **_gallery(comparison, pictures), **code)


# ---- the numbers of the charts


def _payload(comparison: Comparison) -> str:
    """JSON that is safe inside a script element."""
    trials = comparison.trials
    accuracies = [t.accuracy for t in trials]
    value = {
        "classes": comparison.classes,
        "confusion": comparison.best.confusion,
        "costs": [
            dict(key=key, title=title, format=form, front=pareto_front([getattr(t, key) for t in trials], accuracies))
            for key, _, title, form in COSTS
        ],
        "models": [
            dict(
                name=t.name,
                colour=i % COLOURS,
                accuracy=t.accuracy,
                error=t.standard_error,
                history=t.history,
                hover=_hover(t),
                **{key: getattr(t, key) for key, *_ in COSTS},
            )
            for i, t in enumerate(trials)
        ],
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _hover(trial: Trial) -> list[str]:
    return [
        f"accuracy {_percent(trial.accuracy)}",
        f"latency {three(trial.latency_ms)} ms",
        f"throughput {_count(trial.throughput)} images/s",
        f"memory {three(trial.peak_memory_mb)} MB",
        f"{three(trial.params)} parameters, {three(trial.macs)} MACs",
    ]


# ---- the words


def _words(comparison: Comparison) -> dict[str, Any]:
    best, recommendation = comparison.best, comparison.recommendation
    chosen = next(t for t in comparison.trials if t.name == recommendation.model)
    count = len(comparison.trials) + len(comparison.failures)
    rows = _rows(comparison)
    return dict(
        title=f"{count} models compared on {comparison.data}" if count > 1 else f"{best.name} on {comparison.data}",
        version=vitarium.__version__,
        created=comparison.created,
        date=_date(comparison.created),
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
            dict(name="Throughput", value=_count(chosen.throughput), unit="images/s"),
            dict(name="Peak memory", value=three(chosen.peak_memory_mb), unit="MB"),
            dict(name="Parameters", value=three(chosen.params), unit=""),
            dict(name="MACs", value=three(chosen.macs), unit=""),
        ],
        best=best,
        failures=comparison.failures,
        bad_files=comparison.bad_files,
        costs=[dict(key=key, label=label) for key, label, *_ in COSTS],
        columns=[
            dict(label="Model", unit="", numeric=False, sorted="", first="ascending"),
            *(
                dict(label=label, unit=unit, numeric=True, first=first, sorted="descending" if key == "accuracy" else "")
                for key, label, unit, first in COLUMNS
            ),
        ],
        rows=sorted(rows, key=lambda row: row["rank"]),
        in_order=rows,
        confusion_words=_confusion_words(comparison),
        method=_method(comparison),
    )


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row a finished model, in the order asked for; the colour is the place in it."""
    trials, best = comparison.trials, comparison.best
    tops = {key: (min if first == "ascending" else max)(getattr(t, key) for t in trials) for key, _, _, first in COLUMNS}
    ranked = sorted(trials, key=lambda t: (-t.accuracy, t.latency_ms))
    rows = []
    for place, trial in enumerate(trials):
        recommended = trial.name == comparison.recommendation.model
        cells = [
            dict(value=getattr(trial, key), text=_cell(trial, key), note="", best=len(trials) > 1 and getattr(trial, key) == tops[key])
            for key, *_ in COLUMNS
        ]
        cells[0]["note"] = f"± {100 * trial.standard_error:.1f}"
        badges = [word for word, holds in (("recommended", recommended), ("most accurate", trial is best)) if holds]
        rows.append(
            dict(name=trial.name, colour=place % COLOURS, rank=ranked.index(trial), cells=cells, badges=badges, recommended=recommended)
        )
    return rows


def _cell(trial: Trial, key: str) -> str:
    value = getattr(trial, key)
    if key == "accuracy":
        return f"{100 * value:.1f}"
    return f"{value:.0f}" if key == "seconds" else _count(value) if key == "throughput" else three(value)


def _confusion_words(comparison: Comparison) -> str:
    """The most frequent confusion, in words."""
    matrix, classes = comparison.best.confusion, comparison.classes
    wrong = [(n, t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) if t != p and n]
    if not wrong:
        return "Nothing: every held-out image was named rightly."
    n, true, predicted = max(wrong, key=lambda entry: entry[0])
    total = sum(entry[0] for entry in wrong)
    seen = sum(map(sum, matrix))
    most = f"; most often {classes[true]} was called {classes[predicted]} ({n} of {sum(matrix[true])})" if n > 1 else ""
    return f"{total} of {seen} held-out images were named wrongly{most}."


def _method(comparison: Comparison) -> list[dict[str, str]]:
    machine, settings = comparison.machine, comparison.settings
    counts = sorted({t.threads for t in comparison.trials})
    threads = f"{' or '.join(map(str, counts))} {'thread' if counts == [1] else 'threads'}"
    sizes = sorted({t.image_size for t in comparison.trials})
    total = sum(t.seconds for t in comparison.trials)
    device = machine["accelerator"] if settings["accelerator"] != "cpu" and machine["accelerator"] else machine["processor"]
    several = f" {settings['devices']} processes." if settings["devices"] != 1 else ""
    values = {
        "Training": f"{_budget(comparison)} for each model, recipe {settings['recipe']}, batches of {settings['batch_size']}, "
        f"{'from published weights' if settings['pretrained'] else 'from random weights'}.{several} {_duration(total)} in all.",
        "Data": f"{comparison.data}: {comparison.images['train']:,} images to learn from, {comparison.images['val']:,} held out, by which "
        f"everything here is judged. Input of {' or '.join(f'{s}x{s}' for s in sizes)} pixels.",
        "Seed": f"{settings['seed']}, of the split, the first weights and the order of the images. One run a model: differences below a "
        "standard error or two may be luck.",
        "Latency": "time of one image at batch 1 in evaluation mode, after a warm-up: the best of several medians.",
        "Throughput and memory": f"at {settings['measuring_batch']} images a batch; throughput is the best of several medians, memory is "
        "weights, images and activations alive at once in a forward pass.",
        "MACs": "multiply-accumulates for one image, counted in the operations that really run.",
        "Recommendation": "of the models within one standard error of the most accurate, the one with the lowest latency, "
        "if it is clearly faster; else the most accurate.",
        "Machine": f"{device}, {machine['cores']} cores, {threads} for PyTorch; {machine['system']}.",
        "Versions": f"Vitarium {machine['vitarium']}, PyTorch {machine['torch']}, timm {machine['timm']}, Python {machine['python']}.",
    }
    return [dict(name=name, value=value[0].upper() + value[1:] if name != "Data" else value) for name, value in values.items()]


def _budget(comparison: Comparison) -> str:
    ((unit, amount),) = comparison.budget.items()
    return f"{amount:,} {unit if amount != 1 else unit.rstrip('s')}"


def _date(created: str) -> str:
    moment = datetime.datetime.fromisoformat(created)
    return f"{moment.day} {moment:%B %Y}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(value: float) -> str:
    """Three significant digits, written out: 15134.2 -> "15,100"."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else three(value)


def three(value: float) -> str:
    """Three significant digits, with K, M, G or T from a thousand on: 28288354 -> "28.3 M"."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + suffix
    return f"{value:#.3g}".rstrip(".")


# ---- the pictures


def _gallery(comparison: Comparison, pictures: Sequence[Image.Image | None]) -> dict[str, Any]:
    best, classes = comparison.best, comparison.classes
    mistakes = [
        dict(
            true=classes[m.true],
            predicted=classes[m.predicted],
            confidence=f"{100 * m.confidence:.0f} %",
            image=m.image,
            **_picture(picture),
        )
        for m, picture in zip(best.mistakes, pictures, strict=True)
    ]
    total = sum(n for t, row in enumerate(best.confusion) for p, n in enumerate(row) if t != p)
    which = f"The {len(mistakes)} of {total} of which it was most certain" if total > len(mistakes) else "All of them, most certain first"
    return dict(mistakes=mistakes, mistakes_words=f"{which}: what it said and how sure it was, and what it is.")


def _picture(image: Image.Image | None) -> dict[str, Any]:
    """A PNG inside the page, and its size."""
    if image is None:
        return dict(picture="")
    image = image.convert("RGB")
    small = max(image.size) < PICTURE_SIDE // 2
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return dict(picture=f"data:image/png;base64,{data}", width=image.width, height=image.height, pixelated=small)
