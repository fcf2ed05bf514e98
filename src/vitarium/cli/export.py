"""`vitarium export`: a model as an ONNX or torch.export file, checked against the model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.console import err, out, pairs
from vitarium.cli.options import Checkpoint
from vitarium.errors import UsageError
from vitarium.verbs.opening import open_model


class Format(StrEnum):
    """Forms of a graph."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"

    @property
    def ending(self) -> str:
        """The usual ending of such files."""
        return ".onnx" if self is Format.ONNX else ".pt2"


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    checkpoint: Checkpoint = None,
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.ONNX,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default="MODEL.onnx or MODEL.pt2")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square input, pixels.", show_default="the model's own")] = None,
    batch: Annotated[str, typer.Option(metavar="dynamic|INT", help="Images at once that the graph takes: any number or one.")] = "dynamic",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest error accepted: root mean square of the difference over that of the model's outputs.")
    ] = 1e-3,
) -> None:
    """Write a model's graph, run it beside the model, and keep it only if the outputs agree."""
    if batch != "dynamic" and not (batch.isdecimal() and int(batch) > 0):
        raise UsageError(f"--batch must be 'dynamic' or a number from 1 up, got {batch!r}")
    count = None if batch == "dynamic" else int(batch)
    from vitarium.catalog import preprocessing_of
    from vitarium.efficiency.export import export as write

    opened = open_model(model, checkpoint)
    path = output or Path((Path(model).stem if Path(model).is_file() else model.replace("/", "_")) + format.ending)
    with err().status(f"Tracing {model} and checking the graph"):
        done = write(opened, path, format=format.value, image_size=image_size, batch=count, tolerance=tolerance)
    runner = "onnxruntime" if format is Format.ONNX else "the reloaded program"
    sides = (done.batch or "any", preprocessing_of(opened).channels, done.image_size, done.image_size)
    rows = {
        "written": done.path,
        "size": f"{done.bytes / 1e6:.1f} MB",
        "image": f"{' x '.join(map(str, sides))}, float32, prepared as the model's preprocessing does",
        "parity": f"{done.error:.1e}  ({runner} against the model, relative; {tolerance:g} is accepted)",
    }
    out().print(pairs(rows))
