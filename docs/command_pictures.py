"""Drawings for the pages of the commands, from the commands' outputs (docs/examples/*.json) and from the library."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullFormatter, NullLocator

EXAMPLES = Path(__file__).parent / "examples"
TEAL, PALE, AMBER, GREY, INK = "#00796b", "#b2dfdb", "#ffa000", "#cfd8dc", "#37474f"
WIDTH = 7.4
"""Width of the page's text in inches, so that letters keep their size."""
STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#90a4ae",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "vitarium",  # makes the bytes of a drawing reproducible
}


def systems() -> Figure:
    """Draw the progress of each room."""
    from vitarium.catalog.evidence import system_statuses

    colours = {"working": TEAL, "partial": AMBER, "missing": GREY}
    counts: dict[str, dict[str, int]] = {}
    for status in system_statuses():
        room = counts.setdefault(status.room.split("/")[0], dict.fromkeys(colours, 0))
        room[status.status] += 1
    rooms = sorted(counts, key=lambda room: sum(counts[room].values()))
    figure, axes = _sheet(0.36 * len(rooms) + 0.8)
    start = np.zeros(len(rooms))
    for word, colour in colours.items():
        values = np.array([counts[room][word] for room in rooms])
        total = values.sum()
        axes.barh(rooms, values, left=start, color=colour, height=0.7, label=f"{word} ({total})")
        for y, (x, value) in enumerate(zip(start, values, strict=True)):
            if value:
                axes.text(x + value / 2, y, str(value), ha="center", va="center", color="white" if word == "working" else INK)
        start += values
    axes.set_xlabel("systems")
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower right")
    return figure


NAMED = {  # where the name stands: points right of and above the dot
    "swin_pico": (26, -4),
    "drct_pico": (14, 6),
    "tinyvit_5m": (-34, 20),
    "dct_histo_base": (-20, -18),
    "vim_tiny": (28, -30),
    "swin_tiny": (26, -34),
    "convnext_xlarge": (6, -44),
    "uniformer_video_small": (-40, 10),
    "drct_x4": (-20, 10),
}


def models() -> Figure:
    """Draw the cost of all models."""
    rows = [row for row in _read("models") if row["macs"]]
    figure, axes = _sheet(4.2)
    small = [row["params"] < 1e6 for row in rows]
    for wanted, colour, label in ((False, TEAL, "published variants"), (True, AMBER, "pico, for laptops and tests")):
        chosen = [row for row, is_small in zip(rows, small, strict=True) if is_small == wanted]
        x, y = [r["params"] for r in chosen], [r["macs"] for r in chosen]
        axes.scatter(x, y, s=24, color=colour, alpha=0.75, linewidths=0, label=f"{label} ({len(chosen)})")
    for row in rows:
        if row["name"] in NAMED:
            at, shift = (row["params"], row["macs"]), NAMED[row["name"]]
            line = dict(arrowstyle="-", color=INK, lw=0.6, shrinkA=1, shrinkB=0)
            side = "left" if shift[0] > 0 else "right"
            axes.annotate(row["name"], at, shift, textcoords="offset points", ha=side, va="center", fontsize=8.5, arrowprops=line)
            axes.scatter(*at, s=30, facecolor="none", edgecolor=INK, linewidths=1, zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="multiply-accumulates an image")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_short))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="#eceff1")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    return figure


GAP = 62
"""Gap between two boxes, in pixels of their maps."""


def info() -> Figure:
    """Draw ConvNeXt-T's maps as boxes, to scale."""
    import vitarium

    found = vitarium.info("convnext_tiny").report
    side = found["image_size"]
    figure, axes = _sheet(2.1)
    x, unit = 0.0, 1 / 7
    for stage in found["stages"]:
        height, width = side // stage["stride"], stage["channels"] * unit
        axes.add_patch(Rectangle((x, -height / 2), width, height, facecolor=TEAL, edgecolor="white"))
        axes.text(x + width / 2, -34, f"{stage['module']}\n{height} x {height}\n{stage['channels']} channels", ha="center", va="top")
        x += width + GAP
    axes.annotate("", (x - GAP + 16, 0), (-14, 0), arrowprops=dict(arrowstyle="->", color=INK, lw=1), zorder=0)
    axes.text(-18, 0, f"image\n{side} x {side}\n3 channels", ha="right", va="center")
    axes.text(x - GAP + 20, 0, f"mean over places,\n{found['num_classes']} classes", ha="left", va="center")
    axes.set(xlim=(-72, x + 40), ylim=(-72, 32))
    axes.axis("off")
    return figure


def claim() -> Figure:
    """Draw every seed of PiToMe's claim."""
    from vitarium.claims import read_ledger

    (entry,) = [e for e in read_ledger() if e.slug == "pitome"]
    arms: dict[str, dict[str, Any]] = {}
    for comparison in entry.comparisons:
        for arm in (comparison["method"], comparison["baseline"]):
            if arm and arm["unit"] == "%":
                arms[arm["label"]] = arm
    figure, axes = _sheet(2.2)
    labels = list(arms)[::-1]
    for seed in range(len(arms[labels[0]]["values"])):
        axes.plot([arms[label]["values"][seed] for label in labels], range(len(labels)), color=GREY, lw=1, zorder=1)
    for y, label in enumerate(labels):
        values, mean = arms[label]["values"], arms[label]["mean"]
        axes.scatter(values, [y] * len(values), s=42, color=TEAL, zorder=3, label="a seed" if not y else None)
        axes.plot([mean, mean], [y - 0.3, y + 0.3], color=AMBER, lw=3, zorder=2, label="mean" if not y else None)
        axes.text(mean, y + 0.34, f"{mean:.1f} %", ha="center", va="bottom", fontsize=8.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.xaxis.set_major_locator(MultipleLocator(5))
    axes.set(ylim=(-0.5, len(labels) - 0.25), xlabel="accuracy, %, mean of three rates of merging")
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.02))
    return figure


def evaluate() -> Figure:
    """Draw the confusion matrix of the demo's best model."""
    found = _read("evaluate")
    matrix = np.array(found["confusion_matrix"])
    names = [row["name"] for row in found["classes"]]
    right = np.eye(len(matrix), dtype=bool)
    figure, axes = _sheet(3.9, width=4.4)
    colours = np.full((*matrix.shape, 3), 1.0)
    share = (matrix / matrix.sum(1, keepdims=True))[..., None]
    colours = np.where(right[..., None], 1 - share * (1 - _rgb(TEAL)), np.where(share > 0, _rgb(AMBER), colours))
    axes.imshow(colours)
    for (y, x), count in np.ndenumerate(matrix):
        axes.text(x, y, str(count or "·"), ha="center", va="center", color="white" if y == x else INK if count else "#b0bec5")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="what the model says", ylabel="what it is")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def compress() -> Figure:
    """Draw the cost and accuracy of a model after two methods, in percent of before."""
    found = _read("compress")
    rows = [(name, found["before"][key], found["after"][key]) for name, key in COSTS.items()]
    rows.append(("time a call", 1.0, 1 / found["times"]["eager"]["speedup"]))
    figure, axes = _sheet(2.5)
    for y, (_, before, after) in enumerate(reversed(rows)):
        share = 100 * after / before
        worse = share > 101
        axes.barh(y, share - 100, left=100, color=AMBER if worse else TEAL, height=0.6)
        text = f"{share:.0f} %" if share < 99 or share > 101 else f"{share:.1f} %"
        axes.annotate(text, (share, y), (5 if worse else -5, 0), textcoords="offset points", ha="left" if worse else "right", va="center")
    axes.axvline(100, color=INK, lw=1)
    axes.set(xscale="log", xlim=(13, 1400), xlabel="after, in % of before")
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    _ticks(axes, (20, 50, 100, 200, 500, 1000))
    axes.tick_params(axis="y", length=0)
    return figure


COSTS = {"size on disk": "disk_bytes", "weights in memory": "memory_bytes", "MACs": "macs", "accuracy": "accuracy"}


def bench() -> Figure:
    """Draw the peer's time over ours, with minimum and maximum over the rounds."""
    rows = _read("bench")
    figure, axes = _sheet(0.42 * len(rows) + 1.2)
    for y, row in enumerate(reversed(rows)):
        axes.add_patch(Rectangle((row["aa_low"], y - 0.32), row["aa_high"] - row["aa_low"], 0.64, color=GREY, lw=0))
        axes.plot([row["ratio_low"], row["ratio_high"]], [y, y], color=TEAL, lw=2.5, solid_capstyle="round")
        axes.plot(row["ratio"], y, "o", color=TEAL, ms=8)
        axes.annotate(f"{row['ratio']:.2f}", (row["ratio"], y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
    axes.axvline(1, color=INK, lw=1)
    axes.set_yticks(range(len(rows)), [f"{r['model']}, batch {r['batch']}" for r in reversed(rows)])
    axes.set(xlabel="the peer's time over ours, same weights; above 1: ours is faster", ylim=(-0.6, len(rows) - 0.3))
    axes.tick_params(axis="y", length=0)
    axes.plot([], [], "o-", color=TEAL, lw=2.5, ms=8, label="median, least and most of the rounds")
    axes.add_patch(Rectangle((1, -9), 0, 0, color=GREY, lw=0, label="ours / ours: the noise"))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def predict() -> Figure:
    """Draw held-out digits with the model's three most probable answers."""
    from PIL import Image

    from vitarium.data import open_data

    rows = _read("predict")
    digits = open_data("digits").val
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    for number, row in enumerate(rows):
        upper, lower = figure.add_subplot(2, len(rows), number + 1), figure.add_subplot(2, len(rows), len(rows) + number + 1)
        picture, label = digits[row["index"]]
        upper.imshow(picture.convert("L").resize((128, 128), Image.Resampling.NEAREST), cmap="gray")
        upper.set_title(f"a {label}", fontsize=9.5)
        upper.axis("off")
        best = row["classes"][:3][::-1]
        colours = [TEAL if c["label"] == str(label) else AMBER for c in best]
        lower.barh([c["label"] for c in best], [100 * c["probability"] for c in best], color=colours, height=0.65)
        for y, c in enumerate(best):
            lower.text(100 * c["probability"] + 4, y, f"{100 * c['probability']:.0f}", va="center", fontsize=8.5)
        lower.set(xlim=(0, 125), xticks=[])
        lower.tick_params(axis="y", length=0)
        lower.spines["bottom"].set_visible(False)
    figure.supxlabel("probability, %", fontsize=9.5)
    return figure


def export() -> Figure:
    """Draw the logits of the model and of its graph."""
    found = _read("export")
    ours, theirs = np.array(found["model"]), np.array(found["graph"])
    figure, axes = _sheet(3.1, width=4.4)
    ends = [ours.min() - 0.3, ours.max() + 0.3]
    axes.plot(ends, ends, color=GREY, lw=1, zorder=1)
    axes.scatter(ours, theirs, s=16, color=TEAL, alpha=0.6, linewidths=0)
    axes.set(xlabel="logits of the model, PyTorch", ylabel="logits of best.onnx,\nonnxruntime", aspect="equal")
    axes.text(0.04, 0.96, f"largest difference {np.abs(ours - theirs).max():.0e}", transform=axes.transAxes, va="top")
    return figure


DRAWN: dict[str, Callable[[], Figure]] = {
    "systems": systems,
    "models": models,
    "info": info,
    "claim": claim,
    "evaluate": evaluate,
    "compress": compress,
    "bench": bench,
    "predict": predict,
    "export": export,
}


def draw(name: str) -> bytes:
    """Return one of `DRAWN` as SVG on a white card, which suits both colour schemes of the site."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        DRAWN[name]().savefig(file, format="svg", facecolor="white", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.12)
    return file.getvalue()


def _sheet(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _read(name: str) -> Any:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def _rgb(colour: str) -> np.ndarray:
    return np.array(matplotlib.colors.to_rgb(colour))


def _short(value: float, _: object = None) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _ticks(axes: Axes, values: tuple[float, ...]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


if __name__ == "__main__":
    for name in DRAWN:
        Path(f"{name}.svg").write_bytes(draw(name))
