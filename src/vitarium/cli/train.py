"""`vitarium train`: one model by one recipe, on one device or many machines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import clock, out, pairs
from vitarium.cli.evaluate import told
from vitarium.cli.options import Accelerator, DataSpec, Devices, NumNodes, Strategy
from vitarium.errors import UsageError

if TYPE_CHECKING:
    from vitarium.reports.events import Event
    from vitarium.training import FitResult, Progress


class Precision(StrEnum):
    """Number formats of training."""

    FLOAT32 = "32-true"
    BFLOAT16 = "bf16-mixed"
    FLOAT64 = "64-true"


@configurable
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file of your own.")],
    data: DataSpec = "digits",
    model: Annotated[str | None, typer.Option(help="A model's name.", show_default="the recipe's")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published weights.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Start from these weights: file, hf:OWNER/NAME, or address.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as optimizer.lr=1e-4. Repeatable.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; a run that was interrupted goes on.", show_default="runs/RECIPE-MODEL-DATA"),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Number format.", show_default="the recipe's")] = None,
    devices: Devices = 1,
    num_nodes: NumNodes = 1,
    strategy: Strategy = "auto",
    accelerator: Accelerator = "auto",
) -> None:
    """Train a model by a recipe and save it as one file with its labels and preprocessing.

    Interrupted or killed, the same command goes on where it was.
    """
    import vitarium
    from vitarium.catalog.checkpoints import load_checkpoint
    from vitarium.cli.board import Board
    from vitarium.reports.folder import slug
    from vitarium.reports.trial import build_model, is_main_process
    from vitarium.training import ClassificationLearner, fit, load_recipe

    settings = load_recipe(recipe, [*(changes or []), *([f"precision={precision.value}"] if precision else [])])
    name = model or settings.model
    if name is None:
        raise UsageError(f"the recipe {recipe} names no model; choose one with --model ('vitarium models' lists them)")
    images = vitarium.open_data(data, seed=settings.seed, val_fraction=val_fraction)
    settings = settings.model_copy(update=dict(image_size=settings.image_size or images.image_size))
    built = build_model(name, images, settings, pretrained=pretrained)
    if checkpoint is not None:
        load_checkpoint(built, checkpoint)
    folder = out_folder or Path("runs", slug(f"{Path(recipe).stem}-{name}-{images.name}"))
    learner = ClassificationLearner.from_recipe(built, settings)
    with Board([name]) as board:
        result = fit(
            learner,
            images,
            settings,
            folder,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            accelerator=accelerator,
            progress=lambda progress: board(event_of(progress, name)),
        )
        board.finish(name)
    if is_main_process():
        vitarium.save(learner.eval_model(), folder / "model.safetensors")
        show(result, folder / "model.safetensors")


def event_of(progress: Progress, model: str) -> Event:
    """What the board shows of a run."""
    from vitarium.reports.events import Event

    p = progress
    pace = p.seconds / p.step if p.step else None
    return Event(
        "step",
        model,
        position=0,
        count=1,
        step=p.step,
        steps=p.total_steps,
        fraction=p.step / p.total_steps,
        seconds_left=None if pace is None else pace * (p.total_steps - p.step),
        loss=p.loss,
        accuracy=p.metrics.get("accuracy"),
    )


def show(result: FitResult, file: Path) -> None:
    """What came of a run, and what to do with it."""
    rows = told(result.metrics) | {"steps": f"{result.steps} in {clock(result.seconds)}"}
    if result.skipped:
        rows["skipped"] = f"{result.skipped} steps whose loss or gradient was not finite"
    if result.bad_files:
        rows["not readable"] = f"{len(result.bad_files)} images, listed in {file.parent / 'bad_files.txt'}"
    console = out()
    console.print(pairs(rows))
    console.print()
    console.print(pairs({"model": file, "use it": f"vitarium predict IMAGE --model {file}"}))
