"""`vitarium train`: one model by one recipe, on one device or many machines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import clock, out, pairs
from vitarium.cli.evaluate import told
from vitarium.cli.opening import apply_methods
from vitarium.cli.options import DATA_HELP, Accelerator, Apply, Devices, NumNodes, Strategy
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
    data: Annotated[str | None, typer.Option(help=DATA_HELP, show_default="the recipe's")] = None,
    model: Annotated[str | None, typer.Option(help="A model's name.", show_default="the recipe's")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published weights.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Start from these weights: file, hf:OWNER/NAME, or address.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as optimizer.lr=1e-4. Repeatable.")
    ] = None,
    methods: Apply = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; a run that was interrupted goes on.", show_default="runs/RECIPE-MODEL-DATA"),
    ] = None,
    trained_only: Annotated[
        bool, typer.Option("--trained-only", help="Write only what was trained; the file then needs the weights that the model began with.")
    ] = False,
    precision: Annotated[Precision | None, typer.Option(help="Number format.", show_default="the recipe's")] = None,
    devices: Devices = 1,
    num_nodes: NumNodes = 1,
    strategy: Strategy = "auto",
    accelerator: Accelerator = "auto",
) -> None:
    """Train a model by a recipe and save it as one file with its labels, preprocessing and objective.

    Interrupted or killed, the same command goes on where it was.
    """
    import vitarium
    from vitarium.cli.board import Board
    from vitarium.reports.folder import slug
    from vitarium.reports.trial import is_main_process
    from vitarium.training import find_learner, fit, load_recipe

    settings = load_recipe(recipe, [*(changes or []), *([f"precision={precision.value}"] if precision else [])])
    name = model or settings.model
    if name is None:
        raise UsageError(f"the recipe {recipe} names no model; choose one with --model ('vitarium models' lists them)")
    kind = find_learner(settings.objective["name"])
    size = settings.image_size
    drawn = None if kind.data_task == "class" else size
    images = vitarium.open_data(data or settings.data, task=kind.data_task, seed=settings.seed, val_fraction=val_fraction, image_size=drawn)
    settings = settings.model_copy(update=dict(image_size=size or images.image_size))
    folder = out_folder or Path("runs", slug(f"{Path(recipe).stem}-{name}-{images.name}"))
    learner = kind.create(name, images, settings, pretrained=pretrained, checkpoint=checkpoint)
    apply_methods(learner.model, methods, images)
    if trained_only:
        from vitarium.catalog.saving import check_trained_only

        check_trained_only(learner.eval_model())
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
            progress=lambda progress: board(event_of(progress, name, kind.primary_metric[0])),
        )
        board.finish(name)
    if is_main_process():
        trained = learner.eval_model()
        if kind.objective != "classification":
            trained.objective = settings.objective  # type: ignore[assignment]
        vitarium.save(trained, folder / "model.safetensors", trained_only=trained_only)
        show(result, folder / "model.safetensors", kind.usage.format(file=folder / "model.safetensors"))


def event_of(progress: Progress, model: str, metric: str) -> Event:
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
        score=f"{metric.replace('_', ' ')} {p.metrics[metric]:.4g}" if metric in p.metrics else "",
    )


def show(result: FitResult, file: Path, use: str) -> None:
    """What came of a run, and what to do with it."""
    rows = told(result.metrics) | {"steps": f"{result.steps} in {clock(result.seconds)}"}
    if result.skipped:
        rows["skipped"] = f"{result.skipped} steps whose loss or gradient was not finite"
    if result.bad_files:
        rows["not readable"] = f"{len(result.bad_files)} images, listed in {file.parent / 'bad_files.txt'}"
    console = out()
    console.print(pairs(rows))
    console.print()
    pictures = file.parent / "pictures"
    console.print(pairs({"model": file, **({"pictures": pictures} if pictures.is_dir() else {}), "use it": use}))
