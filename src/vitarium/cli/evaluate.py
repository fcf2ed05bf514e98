"""`vitarium evaluate`: the metrics of a model on labelled images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.completion import complete_data
from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, pairs, print_json, print_tables, status
from vitarium.cli.options import (
    DATA_HELP,
    Address,
    Apply,
    BatchSize,
    Checkpoint,
    Device,
    EngineKind,
    Jobs,
    ModelArgument,
    Runtime,
    RuntimeKind,
)

if TYPE_CHECKING:
    from vitarium.verbs.evaluate import Evaluation


class Split(StrEnum):
    """Parts of a data set."""

    AUTO = "auto"
    ALL = "all"
    VAL = "val"
    TEST = "test"
    TRAIN = "train"


SPLIT_HELP = "Part of the data; auto: what was held out when the model was trained, else the held-out part, or all of data without parts."

CALIBRATE_HELP = "Fit a classifier's temperature on half of the images and write it into FILE, so that its probabilities are right."


@configurable
def evaluate(
    model: ModelArgument,
    data: Annotated[
        str | None, typer.Option(help=DATA_HELP, autocompletion=complete_data, show_default="what the file was trained on")
    ] = None,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    corruptions: Annotated[bool, typer.Option("--corruptions", help="Also under ImageNet-C's corruptions, five severities each.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help=CALIBRATE_HELP)] = False,
    remove_calibration: Annotated[bool, typer.Option("--remove-calibration", help="Remove FILE's temperature.")] = False,
    split: Annotated[Split, typer.Option(help=SPLIT_HELP)] = Split.AUTO,
    val_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Measure only this share of data without parts.", show_default="all")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the share that is measured.", show_default="that of the training, else 0")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    runtime: Runtime = RuntimeKind.EAGER,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all metrics.", show_default="none")] = None,
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Evaluate a trained model on labelled images by the metrics of its task, such as accuracy, panoptic quality or PSNR."""
    from vitarium.verbs.evaluate import evaluate as run

    with status() as notify:
        found = run(
            model,
            data,
            checkpoint=checkpoint,
            apply=methods,
            corruptions=corruptions,
            calibrate=calibrate,
            remove_calibration=remove_calibration,
            split=split.value,
            val_fraction=val_fraction,
            seed=seed,
            batch_size=batch_size,
            device=device,
            runtime=runtime.value,
            output=output,
            engine=engine,
            address=address,
            jobs=jobs,
            notify=notify,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        show(found)


def show(found: Evaluation) -> None:
    """Print the metrics as tables."""
    console = out()
    console.print(pairs(found.facts()))
    print_tables(found.tables()[: -1 if found.corruptions else None])
    if found.trained is not None and found.trained.trained and found.split != "train":
        err().print(f"[yellow]the model was trained on {found.trained} of these images: the numbers are too good for new ones[/]")
    if found.kept_card is not None:
        text = f"{found.kept_card} was edited, so it stays as it is and does not mention the change; 'vitarium info' shows the calibration"
        err().print(text, style="yellow", markup=False)
    if found.broken:
        err().print(f"[yellow]{len(found.broken)} images could not be read[/]")
    if found.corruptions:
        errors = found.corruptions
        numbers = {"error": errors["clean_error"], "mean corruption error": errors["mean_corruption_error"]}
        numbers |= {"relative to AlexNet (mCE)": errors["over_alexnet"]} if "over_alexnet" in errors else {}
        console.print(pairs({name: f"{100 * value:.2f} %" for name, value in numbers.items()}))
        print_tables(found.tables()[-1:])
        if "frost" not in errors["errors"]:
            err().print("[yellow]without frost, whose photographs come with: pip install 'vitarium[corruptions]'[/]")
