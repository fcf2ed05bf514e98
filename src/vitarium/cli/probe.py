"""`vitarium probe`: the quality of a model's features without training it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.completion import complete_data, complete_weights
from vitarium.cli.config import configurable
from vitarium.cli.console import out, pairs, print_json, print_tables, status
from vitarium.cli.options import DATA_HELP, BatchSize, Checkpoint, Device, Runtime, RuntimeKind


class Task(StrEnum):
    """Kind of the labels."""

    CLASS = "class"
    MULTILABEL = "multilabel"


@configurable
def probe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE", help="A file that `vitarium train` wrote, or a model's name.", autocompletion=complete_weights
        ),
    ],
    data: Annotated[str, typer.Option(help=DATA_HELP, autocompletion=complete_data)] = "digits",
    task: Annotated[Task, typer.Option(help="One class per image, or several labels.")] = Task.CLASS,
    checkpoint: Checkpoint = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the image, pixels.", show_default="the model's own")] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours that vote.")] = 20,
    uniform: Annotated[bool, typer.Option("--uniform", help="Weigh all neighbours the same, not by exp(similarity / 0.07).")] = False,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    runtime: Runtime = RuntimeKind.EAGER,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the numbers.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Probe a model's frozen features by k nearest neighbours and logistic regression, fitted on the training part of labelled images.

    For pretrained encoders (a masked autoencoder's file, a backbone with weights, timm/NAME, hf/OWNER/NAME) and trained classifiers.
    """
    from vitarium.verbs.probe import probe as run

    with status() as notify:
        found = run(
            model,
            data,
            task=task.value,
            checkpoint=checkpoint,
            image_size=image_size,
            neighbours=neighbours,
            uniform=uniform,
            val_fraction=val_fraction,
            seed=seed,
            batch_size=batch_size,
            device=device,
            runtime=runtime.value,
            output=output,
            notify=notify,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        out().print(pairs(found.facts()))
        print_tables(found.tables())
