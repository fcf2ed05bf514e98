"""`vitarium predict`: what a model sees in pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.console import err, out, print_json, table
from vitarium.cli.opening import apply_methods, find_device, open_model
from vitarium.cli.options import Apply, BatchSize, Checkpoint, Device
from vitarium.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from vitarium.training import Learner

ENDINGS = (".csv", ".json")


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, and folders that are searched to the bottom.")],
    model: Annotated[str, typer.Option(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes told for each picture, the most probable first.")] = 5,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, .csv or .json; of answers that can be drawn: a folder.", show_default="none"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is in pictures. One that cannot be read is named and counted, and the others go on (exit code 3 if none can be read)."""
    from vitarium.catalog.heads import require_head
    from vitarium.training.learners import learner_of

    files = find_pictures(images)
    opened = open_model(model, checkpoint)
    require_head(opened)
    learner = learner_of(opened)
    classes = learner.objective == "classification"
    if output is not None and classes and output.suffix not in ENDINGS:
        raise UsageError(f"--output must end in {' or '.join(ENDINGS)}, got {output}")
    apply_methods(opened, methods, None)
    opened.to(find_device(device))
    with err().status(f"Looking at {len(files)} pictures"):
        rows = look(opened, files, top_k, batch_size) if classes else ask(learner, files, batch_size, output)
    broken = [row for row in rows if "error" in row]
    if len(broken) == len(rows):
        raise DataError("no picture could be read:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in broken[:10]))
    if output is not None and classes:
        write(rows, output)
    (print_json if as_json else show if classes else show_answers)(rows)
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


def ask(learner: Learner, files: list[str], batch_size: int, output: Path | None) -> list[dict[str, Any]]:
    """As `look`, of a model that answers otherwise than by classes: {"image", ...its answer}.

    With an output: the answers in OUTPUT/answers.json (or in OUTPUT itself, where that ends in .json), and beside it a drawing of each.
    """
    import torch

    from vitarium.data import BadFiles
    from vitarium.data.folders import FileImages
    from vitarium.data.loader import Loader
    from vitarium.files import atomic_path, write_json
    from vitarium.nn.modes import evaluating
    from vitarium.training.evaluation import to_device

    model, bad_files = learner.eval_model(), BadFiles(1.0)
    pictures = FileImages(files, [0] * len(files))
    place = next(model.parameters(), torch.empty(0))
    transform = learner.transform(None)
    if getattr(transform, "joint", False) and getattr(transform, "needs_target", True):
        raise UsageError(f"models of the objective {learner.objective!r} look at a picture together with its labels; predict has none")
    loader = Loader(pictures, transform, collate=learner.collate, batch_size=batch_size, bad_files=bad_files)
    rows: list[dict[str, Any]] = [{"image": file} for file in files]
    folder = output if output is not None and output.suffix != ".json" else None
    with evaluating(model, inference=True):
        for batch in loader.epoch(0):
            if not len(batch["index"]):
                continue
            batch = to_device({**batch, "image": batch["image"].to(place.dtype)}, place.device)
            for index, answer in zip(batch["index"].tolist(), learner.answers(model, batch), strict=True):
                rows[index] |= {name: value for name, value in answer.items() if not name.startswith("_")}
                if folder is None:
                    continue
                drawn = learner.picture_of(pictures[index][0], answer)  # type: ignore[arg-type]  # video models draw nothing
                if drawn is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    target = folder / f"{index:04d}-{Path(files[index]).stem}.png"
                    with atomic_path(target) as temporary:
                        drawn.save(temporary, format="png")
                    rows[index]["drawing"] = str(target)
    for path, reason in bad_files.items():
        for row in rows:
            if row["image"] == path:
                row["error"] = reason
    if output is not None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        write_json(output / "answers.json" if folder is not None else output, rows)
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


def show_answers(rows: list[dict[str, Any]]) -> None:
    """A line a picture: what was said of it, shortened."""
    from rich.markup import escape

    result = table("picture", "answer")
    for row in rows:
        if "error" in row:
            result.add_row(escape(row["image"]), f"[yellow]unreadable: {escape(row['error'])}[/]")
            continue
        said = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if name not in ("image", "drawing"))
        result.add_row(escape(row["image"]), escape(said or row.get("drawing", "")))
    out().print(result)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else text[:117] + "..."
