"""Map the evidence in an image for a class of a classifier."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.assignments import parse_call
from vitarium.errors import DataError, UnsupportedModel, UsageError, VitariumError
from vitarium.files import check_output, save_image
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import Notify, apply_methods, find_device, find_images, name_of, open_model, quiet
from vitarium.verbs.result import SHOWN_DRAWINGS, Result, html_drawing, kept

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitarium.catalog.preprocessing import Preprocessing
    from vitarium.explanation.explainers import Explainer

BETTER = {"average_drop": "lower", "increase": "higher", "insertion": "higher", "deletion": "lower", "road": "higher"}
REPORT = "explanations.json"


@dataclass(repr=False)
class Explanations(Result):
    """Overlays that show the evidence for a class.

    Attributes:
        model: file or name.
        folder: holds the overlays and explanations.json.
        rows: one per image, in the order of the files: {"image", "prediction", "target", "explanations"}, or {"image", "error"}. An
            explanation holds "method", "overlay" (name of the file in the folder), "peak" ([x, y] in pixels of the image) and, if they were
            measured, "measures".
        measures: method -> measure -> mean over the images; None if nothing was measured.
    """

    model: str
    folder: Path
    rows: list[dict[str, Any]]
    measures: dict[str, dict[str, float]] | None = None

    @property
    def broken(self) -> list[dict[str, Any]]:
        """Rows of images that could not be explained."""
        return [row for row in self.rows if "error" in row]

    def facts(self) -> dict[str, Any]:
        return {"model": self.model, "images": len(self.rows), "not readable": len(self.broken), "folder": self.folder}

    def tables(self) -> list[TableData]:
        return [overlay_table(self.rows), *([measure_table(self.measures)] if self.measures else [])]

    def _repr_html_(self) -> str:
        """Return the facts, the tables and the first overlays as HTML."""
        from PIL import Image

        drawn = [e["overlay"] for row in self.rows for e in row.get("explanations", [])]
        files = [self.folder / name for name in drawn[:SHOWN_DRAWINGS] if (self.folder / name).is_file()]
        return super()._repr_html_() + "".join(html_drawing(Image.open(file), file.name) for file in files)

    def to_dict(self) -> dict[str, Any]:
        report = {"model": self.model, "images": self.rows}
        return report | ({} if self.measures is None else {"measures": self.measures})


def explain(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str],
    *,
    method: str | Sequence[str] = "grad_cam",
    target: str | int | None = None,
    measure: bool = False,
    checkpoint: str | None = None,
    apply: Sequence[Any] | None = None,
    batch_size: int = 8,
    device: str = "auto",
    notify: Notify = quiet,
) -> Explanations:
    """Draw the evidence in images for a classifier's prediction, or for a given class.

    An unreadable image has a row with its error.

    Args:
        images: files and folders; folders are searched at any depth.
        model: a file of `vitarium.save`, a model's name, or a classifier. A model with `apply` is changed.
        output: folder for overlays and explanations.json.
        method: how to explain, one or several, as "grad_cam" or "rise:masks=500" (see `vitarium.explanation.explainers`).
        target: class to explain, by name or number ("#3" is the number, from 0, whatever the names are); None: the predicted one.
        measure: measure how faithful each method is on these images (see `vitarium.explanation.faithfulness`).
        checkpoint: weights for a name.
        apply: methods to apply first, as "evit:keep=0.7".
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        notify: called with messages about progress.

    Raises:
        UsageError: unknown method, option or class, a model that is no classifier, a head that was never trained, an output that is a
            file, or one that would replace files of others.
        DataError: a folder without images, or no image could be explained.
        CheckpointError: weights that are not available.
    """
    from vitarium.catalog.heads import require_head
    from vitarium.explanation.explainers import class_number, find_explainer, target_numbers
    from vitarium.files import write_json

    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output is a folder for overlays and {REPORT}, and {folder} is a file")
    texts = list(dict.fromkeys([method] if isinstance(method, str) else method))
    if not texts:
        raise UsageError("no method to explain by; name one, such as grad_cam")
    for text in texts:
        find_explainer(parse_call(text)[0])
    files = find_images(images, folder, notify)
    overlays = overlay_names(files, texts)
    check_output(folder / REPORT, *(folder / name for names in overlays for name in names.values()))
    opened = open_model(model, checkpoint)
    require_head(opened)
    opened = apply_methods(opened, apply, None, notify).to(find_device(device))
    number = None if target is None else class_number(opened, target)
    if number is not None:
        target_numbers(opened, number, 1)
    explainers = {text: explainer_of(text, opened) for text in texts}
    notify(f"Explaining {len(files)} images")
    rows = explain_files(opened, explainers, files, number, folder, batch_size, measure=measure)
    found = Explanations(name_of(model), folder, rows, means(rows) if measure else None)
    if len(found.broken) == len(rows):
        raise DataError("no image could be explained:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in found.broken[:10]))
    with kept(found):
        write_json(folder / REPORT, found.to_dict())
    return found


def explainer_of(text: str, model: nn.Module) -> Explainer:
    """Create an explainer (see `create_explainer`).

    Raises:
        UnsupportedModel: it does not support this model; the message names those that do.
    """
    from vitarium.explanation.explainers import create_explainer, list_explainers

    def works(name: str) -> bool:
        try:
            create_explainer(name, model)
        except (VitariumError, ImportError):
            return False
        return True

    try:
        return create_explainer(text, model)
    except UnsupportedModel as error:
        others = ", ".join(name for name in list_explainers() if works(name))
        raise UnsupportedModel(f"{text} does not work on this model: {error}. Methods that work on it: {others or 'none'}") from error


def explain_files(
    model: nn.Module,
    explainers: dict[str, Explainer],
    files: list[str],
    number: int | None,
    output: Path,
    batch_size: int,
    *,
    measure: bool,
) -> list[dict[str, Any]]:
    """Write the overlays, and return the rows of `Explanations`.

    Args:
        model: a classifier in eval mode, on its device.
        explainers: by their text.
        files: images.
        number: class to explain; None: the predicted one.
        output: folder for overlays.
        batch_size: images per forward pass.
        measure: measure faithfulness too.
    """
    import torch

    from vitarium.catalog import preprocessing_of
    from vitarium.catalog.calibration import probabilities
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
            shares = probabilities(model, logits_of(model, model(image)))
        finite = shares.isfinite().all(dim=1)
        wanted = shares.argmax(dim=1) if number is None else torch.full_like(batch["index"], number, device=image.device)
        for index, fine, p, label in zip(batch["index"].tolist(), finite.tolist(), shares, wanted.tolist(), strict=True):
            rows[index] |= classes_of(model, p, label) if fine else {"error": "the model's output is not finite"}
        indices, image, wanted = batch["index"][finite.cpu()].tolist(), image[finite], wanted[finite]
        for text, explainer in explainers.items() if indices else ():
            maps = explainer(image, wanted)
            measured = faithfulness(model, image, maps, wanted) if measure else {}
            for i, index in enumerate(indices):
                target = rows[index]["target"]
                caption = f"{target['label']}, {100 * target['probability']:.1f} %", text
                peak = draw(explainer, files[index], image[i], maps[i], preparation, output / names[index][text], caption)
                found = {"method": text, "overlay": names[index][text], "peak": peak}
                if measure:
                    found["measures"] = {name: float(values[i]) for name, values in measured.items()}
                rows[index].setdefault("explanations", []).append(found)
    reasons = dict(bad_files.items())
    return [row | ({"error": reasons[row["image"]]} if row["image"] in reasons else {}) for row in rows]


def draw(
    explainer: Explainer, file: str, image: Tensor, maps: Tensor, preparation: Preprocessing, path: Path, caption: Sequence[str]
) -> list[int]:
    """Write the overlay of a map (H, W) with its caption, and return the pixel [x, y] of the image at which the map is largest."""
    from vitarium.data.images import open_image
    from vitarium.explanation.heatmap import captioned, seen_box

    original, heat = open_image(file), maps.float().cpu().numpy()
    drawn = explainer.picture(original, image, maps, preparation).convert("RGB")
    save_image(captioned(drawn, caption, scale=explainer.has_scale), path)
    left, top, right, lower = seen_box(original.size, preparation)
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return [int(left + (column + 0.5) * (right - left) / heat.shape[1]), int(top + (row + 0.5) * (lower - top) / heat.shape[0])]


def classes_of(model: nn.Module, probabilities: Tensor, wanted: int) -> dict[str, Any]:
    """Return {"prediction", "target"}, each with label, number and probability."""
    labels = getattr(model, "labels", None) or [f"class {i}" for i in range(len(probabilities))]
    both = {"prediction": int(probabilities.argmax()), "target": wanted}
    return {key: {"label": labels[i], "number": i, "probability": float(probabilities[i])} for key, i in both.items()}


def overlay_names(files: list[str], methods: list[str]) -> list[dict[str, str]]:
    """Return for each file a dictionary method -> name of its overlay; names are unique even for images from several folders."""
    stems = [Path(file).stem for file in files]
    unique = [stem if stems.count(stem) == 1 else f"{i:04d}-{stem}" for i, stem in enumerate(stems)]
    return [{m: f"{stem}-{re.sub(r'[^A-Za-z0-9_.=-]+', '-', m)}.png" for m in methods} for stem in unique]


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return method -> measure -> mean over the images."""
    found: dict[str, dict[str, list[float]]] = {}
    for explanation in (e for row in rows for e in row.get("explanations", [])):
        for name, value in explanation["measures"].items():
            found.setdefault(explanation["method"], {}).setdefault(name, []).append(value)
    return {method: {name: sum(v) / len(v) for name, v in values.items()} for method, values in found.items()}


def overlay_table(rows: list[dict[str, Any]]) -> TableData:
    """Return a table with a row for each image and method."""
    result = TableData("", ["image", "class", ">probability", "method", "overlay"])
    for row in rows:
        if "error" in row:
            result.rows.append([row["image"], "not readable", "", row["error"], ""])
        for explanation in row.get("explanations", []):
            target = row["target"]
            shown = [row["image"], target["label"], f"{100 * target['probability']:.1f} %"]
            result.rows.append([*shown, explanation["method"], explanation["overlay"]])
    return result


def measure_table(measures: dict[str, dict[str, float]]) -> TableData:
    """Return a table with a row for each measure and a column for each method; if there are several, the best of a row has a star."""
    result = TableData("Faithfulness", ["measure", *(f">{method}" for method in measures), "better"])
    for name in next(iter(measures.values()), {}):
        better = next(word for kind, word in BETTER.items() if name.startswith(kind))
        values = [by_name[name] for by_name in measures.values()]
        best = (min if better == "lower" else max)(values)
        cells = [f"{value:.1f} %" if "_" in name else f"{value:.3f}" for value in values]
        marked = [f"* {cell}" if value == best and len(values) > 1 else cell for cell, value in zip(cells, values, strict=True)]
        result.rows.append([name.replace("_", " ") + (" % of the map" if "_" in name else ""), *marked, better])
    return result
