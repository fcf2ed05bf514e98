"""`vitarium train`: one model by one recipe, on one device or many machines."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.completion import complete_data, complete_model, complete_recipe
from vitarium.cli.config import configurable
from vitarium.cli.console import clock, err, note, out, pairs
from vitarium.cli.options import DATA_HELP, Accelerator, Apply, Devices, ImageSize, NumNodes, Strategy
from vitarium.errors import UsageError

if TYPE_CHECKING:
    from vitarium.cli.board import Board
    from vitarium.cli.lines import Lines
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
        str | None,
        typer.Argument(
            help="A recipe's name ('vitarium recipes' lists them), or a YAML file of your own.",
            autocompletion=complete_recipe,
            show_default="none: the recipes that fit are listed",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, autocompletion=complete_data, show_default="the recipe's")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model's name, or a file to train further.", show_default="the recipe's", autocompletion=complete_model),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published weights.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Start from these weights: file, hf:OWNER/NAME, or address.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Length: passes over the training images.", show_default="the recipe's")] = None,
    steps: Annotated[int | None, typer.Option(help="Length: optimizer steps.", show_default="the recipe's")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate (optimizer.lr).", show_default="the recipe's")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="Images per batch; auto: the largest that fits.", show_default="the recipe's"),
    ] = None,
    image_size: ImageSize = None,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Find a learning rate for this recipe and data, and stop.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as optimizer.lr=1e-4. Repeatable.")
    ] = None,
    methods: Apply = None,
    log: Annotated[
        str | None,
        typer.Option(help="Loggers beside log.csv: tensorboard, wandb, mlflow; several with commas.", show_default="the recipe's"),
    ] = None,
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
    from vitarium.training.shorthands import batch_number
    from vitarium.verbs.train import train as run

    given = [*(changes or []), *([f"precision={precision.value}"] if precision else [])]
    batch = batch_number(batch_size)
    weights: dict[str, Any] = dict(model=model, pretrained=pretrained, checkpoint=checkpoint)
    shared: dict[str, Any] = dict(
        image_size=image_size, changes=given, apply=methods, val_fraction=val_fraction, out=out_folder, notify=note
    )
    if find_lr:
        check_alone(dict(epochs=epochs, steps=steps, lr=lr, log=log), batch, devices * num_nodes)
        show_rate(recipe, data, weights, dict(shared, batch_size=batch, accelerator=accelerator))
        return
    with Shown() as shown:
        trained = run(
            recipe,
            data,
            **weights,
            **shared,
            epochs=epochs,
            steps=steps,
            lr=lr,
            batch_size=batch,
            log=log,
            trained_only=trained_only,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            accelerator=accelerator,
            progress=shown,
        )
        if trained is not None:
            shown.finish(trained)
    if trained is not None:
        show(trained)


def check_alone(others: dict[str, Any], batch: int | str | None, processes: int) -> None:
    """Refuse options that a search for a learning rate does not use.

    Raises:
        UsageError: it names one.
    """
    unused = [f"--{name}" for name, value in others.items() if value is not None]
    unused += ["--batch-size auto"] if batch == "auto" else []
    unused += ["--devices or --num-nodes"] if processes > 1 else []
    if unused:
        raise UsageError(f"--find-lr trains a copy of the model for about 100 steps in one process; leave out {unused[0]}")


def show_rate(recipe: str | None, data: str | None, weights: dict[str, Any], options: dict[str, Any]) -> None:
    """Find a learning rate, and print it and where its curve is."""
    from vitarium.verbs.find_lr import find_lr
    from vitarium.verbs.train import no_recipe

    if recipe is None:
        raise UsageError(no_recipe(weights["model"]))
    found = find_lr(recipe, data, **weights, **options)
    console = out()
    console.print(pairs(found.facts()))
    console.print()
    console.print(pairs({"use it": found.use}))


class Shown:
    """Progress of a run: a live table on a terminal, else lines. A context manager, and the progress callback of the verb."""

    def __init__(self) -> None:
        self.board: Board | None = None
        self.lines: Lines | None = None
        self.last: tuple[str, Task, Progress] | None = None

    def __enter__(self) -> Shown:
        return self

    def __call__(self, name: str, task: Task, at: Progress) -> None:
        from vitarium.cli.board import Board
        from vitarium.cli.lines import Lines

        self.last = name, task, at
        if not err().is_terminal:
            self.lines = self.lines or Lines(name)
            self.lines(at, task)
            return
        if self.board is None:
            self.board = Board([name])
            self.board.__enter__()
        self.board(event_of(at, name, task))

    def finish(self, trained: Trained) -> None:
        """Show the final metrics, which belong to the weights that are kept."""
        if self.last is None:
            return
        name, task, at = self.last
        final = replace(at, metrics=trained.fit.metrics, step=trained.fit.steps)
        if self.lines is not None:
            self.lines.finish(final, task)
        elif self.board is not None:
            self.board(event_of(final, name, task))
            self.board.finish(name)

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.__exit__(None, None, None)


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
    early = ", stopped early" if result.stopped_early else ""
    rows = trained.task.texts(result.metrics) | {"steps": f"{result.steps} in {clock(result.seconds)}{early}"}
    if result.best_step is not None:
        rows["kept"] = f"the weights of step {result.best_step}, the best evaluation"
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
    shown = {"report": trained.page} if trained.page is not None else {}
    shown |= {"drawings": drawings} if drawings.is_dir() else {}
    console.print(pairs({"model": trained.file, **shown, "use it": trained.use}))
