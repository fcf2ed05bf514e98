"""`vitarium probe`: what a model's features are worth as they are."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, pairs, print_json, table
from vitarium.cli.opening import find_device, open_model
from vitarium.cli.options import DATA_HELP, BatchSize, Checkpoint, Device

NAMES = {"accuracy": "accuracy", "top5": "first five", "auroc": "AUROC", "mean_average_precision": "mean average precision"}
PROBES = {"knn": "nearest neighbours", "linear": "logistic regression"}


class Task(StrEnum):
    """What the labels are."""

    CLASS = "class"
    MULTILABEL = "multilabel"


@configurable
def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A file that `vitarium train` wrote, or a model's name.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "digits",
    task: Annotated[Task, typer.Option(help="A class a picture, or several labels.")] = Task.CLASS,
    checkpoint: Checkpoint = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours that vote.")] = 20,
    uniform: Annotated[bool, typer.Option("--uniform", help="All neighbours' votes weigh the same, not exp(similarity / 0.07).")] = False,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the numbers.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Probe a model's frozen features: k nearest neighbours and logistic regression, learned from the training part of labelled images.

    For pretrained encoders (a masked autoencoder's file, a backbone with weights) and for trained classifiers alike.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.data import open_data
    from vitarium.files import write_json
    from vitarium.pretraining.probes import TEMPERATURE
    from vitarium.pretraining.probes import probe as run

    opened = open_model(model, checkpoint)
    size = preprocessing_of(opened).image_size
    images = open_data(data, task=task.value, seed=seed, val_fraction=val_fraction, image_size=size)
    opened.to(find_device(device))
    with err().status(f"Looking at {len(images.train)} and {len(images.val)} pictures"):
        found = run(opened, images, neighbours=neighbours, temperature=None if uniform else TEMPERATURE, batch_size=batch_size)
    report = {"model": model, "data": images.name, "train": len(images.train), "val": len(images.val), **found}
    if output is not None:
        write_json(output, report)
    if as_json:
        return print_json(report)
    console = out()
    console.print(
        pairs({"features": model, "learned from": f"{len(images.train)} images ({images.name})", "held out": str(len(images.val))})
    )
    metrics = list(found["knn"])
    rows = table("probe", *(f">{NAMES[name]}" for name in metrics))
    for name, numbers in found.items():
        rows.add_row(PROBES[name], *(f"{100 * numbers[metric]:.2f} %" for metric in metrics))
    console.print(rows)
