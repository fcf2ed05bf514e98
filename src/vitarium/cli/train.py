"""`vitarium train`: one model by one recipe, on one device or many machines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.completion import complete_data, complete_model, complete_recipe
from vitarium.cli.config import configurable
from vitarium.cli.console import clock, err, note, out, pairs
from vitarium.cli.options import DATA_HELP, Accelerator, Apply, Devices, NumNodes, Strategy

if TYPE_CHECKING:
    from vitarium.reports.events import Event
    from vitarium.training import Progress
    from vitarium.training.tasks import Task
    from vitarium.verbs.train import Trained


class Precision(StrEnum):
    """Number formats of training."""

    FLOAT32 = "32-true"
    BFLOAT16 = "bf16-mixed"
    FLOAT64 = "64-true"


@configurable
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name ('vitarium recipes' lists them), or a YAML file of your own.", autocompletion=complete_recipe),
    ],
    data: Annotated[str | None, typer.Option(help=DATA_HELP, autocompletion=complete_data, show_default="the recipe's")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model's name, or a file to train further.", show_default="the recipe's", autocompletion=complete_model),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published weights.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Start from these weights: file, hf:OWNER/NAME, or address.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as optimizer.lr=1e-4. Repeatable.")
    ] = None,
    methods: Apply = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; an interrupted run resumes.", show_default="runs/RECIPE-MODEL-DATA"),
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
    """Train a model by a recipe and save it as one file with its labels, preprocessing, task and learner.

    After an interruption the same command resumes the run.
    """
    from vitarium.cli.board import Board
    from vitarium.verbs.train import train as run

    shown: list[Board] = []

    def progress(name: str, task: Task, at: Progress) -> None:
        if not shown:
            shown.append(Board([name]))
            shown[0].__enter__()
        shown[0](event_of(at, name, task))
        if at.step == at.total_steps:
            shown[0].finish(name)

    try:
        trained = run(
            recipe,
            data,
            model=model,
            pretrained=pretrained,
            checkpoint=checkpoint,
            changes=[*(changes or []), *([f"precision={precision.value}"] if precision else [])],
            apply=methods,
            val_fraction=val_fraction,
            out=out_folder,
            trained_only=trained_only,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            accelerator=accelerator,
            progress=progress,
            notify=note,
        )
    finally:
        for board in shown:
            board.__exit__(None, None, None)
    if trained is not None:
        show(trained)


def event_of(progress: Progress, model: str, task: Task) -> Event:
    """Return the board's row for a run."""
    from vitarium.reports.events import Event

    p, metric = progress, task.primary
    pace = p.seconds / p.step if p.step else None
    score = f"{metric.name.replace('_', ' ')} {p.metrics[metric.name]:.4g}" if metric.name in p.metrics else ""
    means = {name: p.metrics[key] for name in p.losses if (key := f"train_{name}.loss") in p.metrics}  # for several players
    score = ", ".join(filter(None, [score, *(f"{name} {loss:.3f}" for name, loss in means.items())]))
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
        score=score,
    )


def show(trained: Trained) -> None:
    """Print the outcome of a run and the command to use its model."""
    result, folder = trained.fit, trained.file.parent
    rows = trained.task.texts(result.metrics) | {"steps": f"{result.steps} in {clock(result.seconds)}"}
    if result.skipped:
        rows["skipped"] = f"{result.skipped} steps whose loss or gradient was not finite"
    if result.bad_files:
        rows["not readable"] = f"{len(result.bad_files)} images, listed in {folder / 'bad_files.txt'}"
    console = out()
    if trained.finished_before:
        err().print(trained.finished_before, style="yellow", markup=False, soft_wrap=True)
    console.print(pairs(rows))
    console.print()
    drawings = folder / "pictures"
    console.print(pairs({"model": trained.file, **({"drawings": drawings} if drawings.is_dir() else {}), "use it": trained.use}))
