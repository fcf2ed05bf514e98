"""`vitarium predict`: what a model sees in pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.console import err, out, print_json, table
from vitarium.cli.opening import find_device, open_model
from vitarium.cli.options import BatchSize, Checkpoint, Device
from vitarium.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

ENDINGS = (".csv", ".json")


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, and folders that are searched to the bottom.")],
    model: Annotated[str, typer.Option(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    checkpoint: Checkpoint = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes told for each picture, the most probable first.")] = 5,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write, .csv or .json.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Name what is in pictures. One that cannot be read is named and counted, and the others go on (exit code 3 if none can be read)."""
    if output is not None and output.suffix not in ENDINGS:
        raise UsageError(f"--output must end in {' or '.join(ENDINGS)}, got {output}")
    files = find_pictures(images)
    opened = open_model(model, checkpoint).to(find_device(device))
    with err().status(f"Looking at {len(files)} pictures"):
        rows = look(opened, files, top_k, batch_size)
    broken = [row for row in rows if "error" in row]
    if len(broken) == len(rows):
        raise DataError("no picture could be read:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in broken[:10]))
    if output is not None:
        write(rows, output)
    (print_json if as_json else show)(rows)
    if broken:
        err().print(f"[yellow]{len(broken)} of {len(rows)} pictures could not be read[/]")
    if output is not None:
        err().print(f"written: {output}", markup=False, style="dim")


def find_pictures(paths: list[Path]) -> list[str]:
    """The files that are named, and the pictures (or, where there are none, the videos) below the folders that are named, in order.

    Raises:
        DataError: a folder without pictures.
    """
    from vitarium.data.folders import find_images, find_videos

    found: list[str] = []
    for path in paths:
        inside = (sorted(find_images(path)) or sorted(find_videos(path))) if path.is_dir() else [str(path)]
        if not inside:
            raise DataError(f"{path} holds no pictures and no videos")
        found += inside
    return found


def look(model: nn.Module, files: list[str], top_k: int, batch_size: int) -> list[dict[str, Any]]:
    """For each file {"image", "predictions": [{"label", "probability"}, ...]}, or {"image", "error"}; in the order of the files."""
    from vitarium.data import BadFiles
    from vitarium.data.folders import FileImages
    from vitarium.training import predict_logits

    bad_files = BadFiles(1.0)
    logits, _, indices = predict_logits(model, FileImages(files, [0] * len(files)), batch_size=batch_size, bad_files=bad_files)
    labels = getattr(model, "labels", None) or [f"class {i}" for i in range(logits.shape[-1])]
    rows: list[dict[str, Any]] = [{"image": file} for file in files]
    for index, scores in zip(indices.tolist(), logits, strict=True):
        if scores.isfinite().all():
            shares, classes = (found.tolist() for found in scores.softmax(-1).topk(min(top_k, len(scores))))
            rows[index]["predictions"] = [{"label": labels[c], "probability": p} for c, p in zip(classes, shares, strict=True)]
        else:
            rows[index]["error"] = "the model's output is not finite"
    reasons = dict(bad_files.items())
    for row in rows:
        if row["image"] in reasons:
            row["error"] = reasons[row["image"]]
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Predictions to a file, by its ending; in a CSV a line a picture, with columns label_1, probability_1, label_2, ..."""
    from vitarium.files import write_json, write_text

    if path.suffix == ".json":
        return write_json(path, rows)
    places = range(1, 1 + max(len(row.get("predictions", [])) for row in rows))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(f"{kind}_{i}" for i in places for kind in ("label", "probability")), "error"])
    for row in rows:
        cells = [cell for p in row.get("predictions", []) for cell in (p["label"], f"{p['probability']:.6f}")]
        writer.writerow([row["image"], *(cells or [""] * 2 * len(places)), row.get("error", "")])
    write_text(path, text.getvalue())


def show(rows: list[dict[str, Any]]) -> None:
    """A line a picture."""
    from rich.markup import escape

    result = table("picture", "label", ">probability", "~then")
    for row in rows:
        if "error" in row:
            result.add_row(escape(row["image"]), "[yellow]unreadable[/]", "", f"[yellow]{escape(row['error'])}[/]")
            continue
        first, *others = row["predictions"]
        then = ", ".join(f"{escape(p['label'])} {100 * p['probability']:.1f} %" for p in others)
        result.add_row(escape(row["image"]), f"[bold]{escape(first['label'])}[/]", f"{100 * first['probability']:.1f} %", f"[dim]{then}[/]")
    out().print(result)
