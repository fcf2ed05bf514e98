"""`vitarium explain`: where in a picture a classifier sees the evidence for a class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.console import err, note, out, print_json, table
from vitarium.cli.options import Apply, Checkpoint, Device
from vitarium.errors import DataError, UsageError
from vitarium.verbs.opening import apply_methods, find_device, open_model
from vitarium.verbs.opening import find_images as find_pictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitarium.catalog.preprocessing import Preprocessing
    from vitarium.explanation.explainers import Explainer

BETTER = {"average_drop": "lower", "increase": "higher", "insertion": "higher", "deletion": "lower", "road": "higher"}


def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, and folders that are searched to the bottom.")],
    model: Annotated[str, typer.Option(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for overlays and explanations.json.")],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:KEY=VALUE,...]", help="How to explain, as rise:masks=500. Repeatable.", show_default="grad_cam"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Class to explain, by name or number.", show_default="predicted")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure how faithful each method is on these pictures.")] = False,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 8,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show where in pictures a classifier sees the evidence for what it says, or for a class of yours.

    Methods: t_tame (of a model that 'vitarium train t_tame' made), grad_cam, rollout, gradient_input, rise, integrated_gradients,
    occlusion, smooth_grad, gradient_shap, token_tree (draws which patches hang together), and random to compare with. A picture
    that cannot be read is named and counted, and the others go on.
    """
    from vitarium.catalog.heads import require_head
    from vitarium.explanation.explainers import class_number, create_explainer, target_numbers
    from vitarium.files import write_json

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output is a folder for overlays and explanations.json, and {output} is a file")
    files = find_pictures(images)
    opened = open_model(model, checkpoint)
    require_head(opened)
    opened = apply_methods(opened, methods, None, note).to(find_device(device))
    number = None if target is None else class_number(opened, target)
    if number is not None:
        target_numbers(opened, number, 1)
    explainers = {text: create_explainer(text, opened) for text in dict.fromkeys(method or ["grad_cam"])}
    with err().status(f"Explaining {len(files)} pictures"):
        rows = run(opened, explainers, files, number, output, batch_size, measure=measure)
    broken = [row for row in rows if "error" in row]
    if len(broken) == len(rows):
        raise DataError("no picture could be explained:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in broken[:10]))
    report = {"model": model, "pictures": rows, **({"measures": means(rows)} if measure else {})}
    write_json(output / "explanations.json", report)
    (print_json if as_json else show)(report)
    if broken:
        err().print(f"[yellow]{len(broken)} of {len(rows)} pictures could not be explained[/]")
    err().print(f"written: {output / 'explanations.json'} and the overlays beside it", markup=False, style="dim", soft_wrap=True)


def run(
    model: nn.Module,
    explainers: dict[str, Explainer],
    files: list[str],
    number: int | None,
    output: Path,
    batch_size: int,
    *,
    measure: bool,
) -> list[dict[str, Any]]:
    """Write the overlays; for each file {"image", "prediction", "target", "explanations"}, or {"image", "error"}, in the files' order."""
    import torch

    from vitarium.catalog import preprocessing_of
    from vitarium.data import BadFiles
    from vitarium.data.folders import FileImages
    from vitarium.data.loader import Loader
    from vitarium.explanation.faithfulness import measure as faithfulness
    from vitarium.explanation.reading import logits_of

    bad_files = BadFiles(1.0)
    preparation, place = preprocessing_of(model), next(model.parameters(), torch.empty(0))
    names = overlay_names(files, list(explainers))
    rows: list[dict[str, Any]] = [{"image": file} for file in files]
    for batch in Loader(FileImages(files, [0] * len(files)), preparation, batch_size=batch_size, bad_files=bad_files).epoch(0):
        if not len(batch["index"]):
            continue
        image = batch["image"].to(place)
        with torch.no_grad():
            probabilities = logits_of(model, model(image)).softmax(dim=1)
        finite = probabilities.isfinite().all(dim=1)
        wanted = probabilities.argmax(dim=1) if number is None else torch.full_like(batch["index"], number, device=image.device)
        for index, fine, p, label in zip(batch["index"].tolist(), finite.tolist(), probabilities, wanted.tolist(), strict=True):
            rows[index] |= told(model, p, label) if fine else {"error": "the model's output is not finite"}
        indices, image, wanted = batch["index"][finite.cpu()].tolist(), image[finite], wanted[finite]
        for text, explainer in explainers.items() if indices else ():
            maps = explainer(image, wanted)
            measured = faithfulness(model, image, maps, wanted) if measure else {}
            for i, index in enumerate(indices):
                peak = draw(explainer, files[index], image[i], maps[i], preparation, output / names[index][text])
                found = {"method": text, "overlay": names[index][text], "peak": peak}
                if measure:
                    found["measures"] = {name: float(values[i]) for name, values in measured.items()}
                rows[index].setdefault("explanations", []).append(found)
    reasons = dict(bad_files.items())
    for row in rows:
        if row["image"] in reasons:
            row["error"] = reasons[row["image"]]
    return rows


def draw(explainer: Explainer, file: str, image: Tensor, maps: Tensor, preparation: Preprocessing, path: Path) -> list[int]:
    """Write what an explainer draws of a map (H, W) over a picture; told is where in the picture the map is largest, [x, y] in pixels."""
    from vitarium.data.images import open_image
    from vitarium.explanation.heatmap import seen_box
    from vitarium.files import atomic_path

    picture, heat = open_image(file), maps.float().cpu().numpy()
    with atomic_path(path) as temporary:
        explainer.picture(picture, image, maps, preparation).save(temporary, format="png")
    left, top, right, lower = seen_box(picture.size, preparation)
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return [int(left + (column + 0.5) * (right - left) / heat.shape[1]), int(top + (row + 0.5) * (lower - top) / heat.shape[0])]


def told(model: nn.Module, probabilities: Tensor, wanted: int) -> dict[str, Any]:
    """{"prediction", "target"}, each with label, number and probability."""
    labels = getattr(model, "labels", None) or [f"class {i}" for i in range(len(probabilities))]
    both = {"prediction": int(probabilities.argmax()), "target": wanted}
    return {key: {"label": labels[i], "number": i, "probability": float(probabilities[i])} for key, i in both.items()}


def overlay_names(files: list[str], methods: list[str]) -> list[dict[str, str]]:
    """For each file, method -> name of its overlay; no two are equal, whatever folders the pictures come from."""
    stems = [Path(file).stem for file in files]
    unique = [stem if stems.count(stem) == 1 else f"{i:04d}-{stem}" for i, stem in enumerate(stems)]
    return [{m: f"{stem}-{re.sub(r'[^A-Za-z0-9_.=-]+', '-', m)}.png" for m in methods} for stem in unique]


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Method -> measure -> mean over the pictures."""
    found: dict[str, dict[str, list[float]]] = {}
    for explanation in (e for row in rows for e in row.get("explanations", [])):
        for name, value in explanation["measures"].items():
            found.setdefault(explanation["method"], {}).setdefault(name, []).append(value)
    return {method: {name: sum(v) / len(v) for name, v in values.items()} for method, values in found.items()}


def show(report: dict[str, Any]) -> None:
    """A line a picture and method, and the measures' means."""
    from rich.markup import escape

    result = table("picture", "class", ">probability", "method", "overlay")
    for row in report["pictures"]:
        if "error" in row:
            result.add_row(escape(row["image"]), "[yellow]unreadable[/]", "", f"[yellow]{escape(row['error'])}[/]", "")
        for explanation in row.get("explanations", []):
            target = row["target"]
            cells = (row["image"], target["label"], f"{100 * target['probability']:.1f} %", explanation["method"], explanation["overlay"])
            result.add_row(*map(escape, cells))
    out().print(result)
    if "measures" in report:
        show_measures(report["measures"])


def show_measures(measures: dict[str, dict[str, float]]) -> None:
    """A line a measure, a column a method; the best of a line is bold."""
    from rich.markup import escape

    result = table("measure", *(f">{escape(method)}" for method in measures), "better")
    for name in next(iter(measures.values()), {}):
        better = next(word for kind, word in BETTER.items() if name.startswith(kind))
        values = [by_name[name] for by_name in measures.values()]
        best = (min if better == "lower" else max)(values)
        cells = [f"{value:.1f} %" if "_" in name else f"{value:.3f}" for value in values]
        marked = [f"[bold]{cell}[/]" if value == best and len(values) > 1 else cell for cell, value in zip(cells, values, strict=True)]
        result.add_row(name.replace("_", " ") + (" % of the map" if "_" in name else ""), *marked, better)
    out().print(result)
