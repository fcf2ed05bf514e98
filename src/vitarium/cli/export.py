"""`vitarium export`: a model as an ONNX or torch.export file, checked against the model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.console import out, pairs, status
from vitarium.cli.options import Checkpoint, ModelArgument


class Format(StrEnum):
    """Formats of a graph."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


def export(
    model: ModelArgument,
    checkpoint: Checkpoint = None,
    format: Annotated[Format, typer.Option(help="Format of the graph.")] = Format.ONNX,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default="MODEL.onnx or MODEL.pt2")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square input, pixels.", show_default="the model's own")] = None,
    batch: Annotated[str, typer.Option(metavar="dynamic|INT", help="Images at once that the graph takes: any number or one.")] = "dynamic",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest error accepted: root mean square of the difference over that of the model's outputs.")
    ] = 1e-3,
) -> None:
    """Write a model's graph, compare its outputs with the model's, and keep it only if they agree."""
    from vitarium.verbs.export import export as run

    with status() as notify:
        found = run(
            model,
            output,
            checkpoint=checkpoint,
            format=format.value,
            image_size=image_size,
            batch=batch,  # type: ignore[arg-type]  # its text is checked
            tolerance=tolerance,
            notify=notify,
        )
    out().print(pairs(found.facts()))
