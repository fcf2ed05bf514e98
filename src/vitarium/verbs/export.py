"""Export a model as a graph that runs without this library."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitarium.errors import UsageError, nearest
from vitarium.files import check_output, is_model_file
from vitarium.verbs.opening import Notify, name_of, open_model, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from torch import nn

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}


@dataclass(repr=False)
class Exported(Result):
    """An exported graph.

    Attributes:
        model: file or name.
        file: that was written.
        format: "onnx" or "torch-export".
        image: sides of the input (B, C, H, W), B "any" for a variable batch; float32, prepared by the model's preprocessing.
        bytes: size of the file.
        error: root mean square of (graph - model) over that of the model's outputs, the largest over the batches tried.
        tolerance: largest accepted error.
    """

    model: str
    file: str
    format: str
    image: tuple[int | str, ...]
    bytes: int
    error: float
    tolerance: float

    def facts(self) -> dict[str, Any]:
        runner = "onnxruntime" if self.format == "onnx" else "the reloaded program"
        return {
            "written": self.file,
            "size": f"{self.bytes / 1e6:.1f} MB",
            "image": f"{' x '.join(map(str, self.image))}, float32, prepared as the model's preprocessing does",
            "parity": f"{self.error:.1e}  ({runner} against the model, relative; {self.tolerance:g} is accepted)",
        }

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"image": list(self.image)}


def export(
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | None = None,
    format: Literal["onnx", "torch-export"] = "onnx",
    image_size: int | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    tolerance: float = 1e-3,
    notify: Notify = quiet,
) -> Exported:
    """Write a model's graph, compare its outputs with the model's, and keep it only if they agree.

    Args:
        model: a file of `vitarium.save`, a model's name, or a model, which is not changed.
        output: file to write; None: the model's name with the format's ending, in the current folder.
        checkpoint: weights for a name.
        format: "onnx" (input "image", output "logits") or "torch-export".
        image_size: side of the square input, pixels; None: the model's own.
        batch: images per call of the graph; "dynamic": any number.
        tolerance: largest accepted relative error (root mean square).
        notify: called with messages about progress.

    Raises:
        UsageError: unknown model or format, an output of another ending or that would replace a file of others, a model that cannot be
            traced, or one that is too large for the format.
        CheckpointError: weights that are not available, or a graph with outputs that differ from the model's; nothing is written.
        MissingExtra: onnx is not installed.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.efficiency.export import export as write

    if format not in ENDINGS:
        raise UsageError(f"unknown format {format!r}{nearest(format, ENDINGS)} (formats: {', '.join(ENDINGS)})")
    number = str(batch)
    if number != "dynamic" and not (number.isdecimal() and int(number) > 0):
        raise UsageError(f"--batch must be 'dynamic' or a number from 1 up, got {batch!r}")
    opened, name = open_model(model, checkpoint), name_of(model)
    stem = Path(name).stem if is_model_file(model) else name.replace("/", "_")
    path = Path(output) if output is not None else Path(stem + ENDINGS[format])
    if path.suffix != ENDINGS[format]:
        raise UsageError(f"the output of the format {format} must end in {ENDINGS[format]}, got {path}")
    check_output(path)
    notify(f"Tracing {name} and checking the graph")
    count = None if number == "dynamic" else int(number)
    done = write(opened, path, format=format, image_size=image_size, batch=count, tolerance=tolerance)
    sides = (done.batch or "any", preprocessing_of(opened).channels, done.image_size, done.image_size)
    return Exported(name, str(done.path), format, sides, done.bytes, done.error, tolerance)
