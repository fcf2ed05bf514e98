"""`vitarium probe`: the quality of a model's features without training it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, pairs, print_json, table
from vitarium.cli.options import DATA_HELP, BatchSize, Checkpoint, Device
from vitarium.verbs.opening import find_device, open_model

if TYPE_CHECKING:
    from torch import nn

    from vitarium.data import ImageData

NAMES = {"accuracy": "accuracy", "top5": "top 5", "auroc": "AUROC", "mean_average_precision": "mean average precision"}
PROBES = {"knn": "nearest neighbours", "linear": "logistic regression"}


class Task(StrEnum):
    """Kind of the labels."""

    CLASS = "class"
    MULTILABEL = "multilabel"


@configurable
def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A file that `vitarium train` wrote, or a model's name.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "digits",
    task: Annotated[Task, typer.Option(help="One class per image, or several labels.")] = Task.CLASS,
    checkpoint: Checkpoint = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the image, pixels.", show_default="the model's own")] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours that vote.")] = 20,
    uniform: Annotated[bool, typer.Option("--uniform", help="Weigh all neighbours the same, not by exp(similarity / 0.07).")] = False,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the numbers.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Probe a model's frozen features by k nearest neighbours and logistic regression, fitted on the training part of labelled images.

    For pretrained encoders (a masked autoencoder's file, a backbone with weights, timm/NAME, hf/OWNER/NAME) and trained classifiers.
    """
    from vitarium.files import write_json

    opened, images = open_for_probe(
        model, data, task=task.value, checkpoint=checkpoint, image_size=image_size, val_fraction=val_fraction, seed=seed
    )
    opened.to(find_device(device))
    with err().status(f"Reading {len(images.train)} and {len(images.val)} images"):
        found = measure(opened, images, neighbours=neighbours, uniform=uniform, batch_size=batch_size)
    report = {"model": model, "data": images.name, "train": len(images.train), "val": len(images.val), **found}
    if output is not None:
        write_json(output, report)
    print_json(report) if as_json else show(report, found)


def open_for_probe(
    model: str,
    data: str,
    *,
    task: str = "class",
    checkpoint: str | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[nn.Module, ImageData]:
    """Return a model in eval mode at an image size, and the labelled images for its probe.

    Args:
        model: a saved file, or a model's name.
        data: as for `open_data`.
        task: "class" or "multilabel".
        checkpoint: weights for a name; None: its published ones.
        image_size: side of the image, pixels; None: the model's own.
        val_fraction, seed: of the split of data that has no val/ part.

    Raises:
        UsageError, CheckpointError, DataError: unknown model, size that it cannot take, unreadable weights or data.
    """
    from vitarium.catalog.create import preprocessing_of, set_image_size
    from vitarium.data import open_data

    opened = open_model(model, checkpoint)
    if image_size is not None:
        set_image_size(opened, image_size)
    size = preprocessing_of(opened).image_size
    return opened, open_data(data, task=task, seed=seed, val_fraction=val_fraction, image_size=size)


def measure(model: nn.Module, images: ImageData, *, neighbours: int, uniform: bool, batch_size: int) -> dict[str, dict[str, float]]:
    """Return both probes' metrics (see `vitarium.pretraining.probes.probe`); `uniform` weighs all neighbours the same."""
    from vitarium.pretraining.probes import TEMPERATURE
    from vitarium.pretraining.probes import probe as run

    return run(model, images, neighbours=neighbours, temperature=None if uniform else TEMPERATURE, batch_size=batch_size)


def show(report: dict[str, Any], found: dict[str, dict[str, float]]) -> None:
    """Print the metrics as a table."""
    console = out()
    learned = f"{report['train']} images ({report['data']})"
    console.print(pairs({"features": report["model"], "learned from": learned, "held out": str(report["val"])}))
    metrics = list(found["knn"])
    rows = table("probe", *(f">{NAMES[name]}" for name in metrics))
    for name, numbers in found.items():
        rows.add_row(PROBES[name], *(f"{100 * numbers[metric]:.2f} %" for metric in metrics))
    console.print(rows)
