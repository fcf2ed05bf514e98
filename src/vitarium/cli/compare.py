"""`vitarium compare`: train models under the same budget, measure them, recommend one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.completion import complete_data, complete_models, complete_recipe
from vitarium.cli.config import configurable
from vitarium.cli.console import out, pairs, table
from vitarium.cli.options import DATA_HELP, Accelerator, Address, Devices, EngineKind, ImageSize, Jobs, NumNodes, RuntimeKind, Strategy

if TYPE_CHECKING:
    from vitarium.reports.results import Comparison

RUNTIME_HELP = "Time the trained models with it as well, and recommend by that latency."
BUDGET, OUTPUT = "Budget of each model (one of them)", "Output"


@configurable
def compare(
    data: Annotated[
        str | None, typer.Option(help=DATA_HELP, autocompletion=complete_data, show_default="the recipe's, else fashion")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Names and patterns such as '*_pico', with commas.",
            autocompletion=complete_models,
            show_default="six small classifiers, or the recipe's",
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published weights.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How to train: a recipe's name, or a YAML file.",
            autocompletion=complete_recipe,
            show_default="fashion for these images, else pico",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=BUDGET)] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the training images.", rich_help_panel=BUDGET)] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Minutes of training.", rich_help_panel=BUDGET)] = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step.", show_default="the recipe's")] = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the weights and the order of the images.")] = 0,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for results and report.", show_default="runs/DATA-DATE", rich_help_panel=OUTPUT)
    ] = None,
    devices: Devices = 1,
    num_nodes: NumNodes = 1,
    strategy: Strategy = "auto",
    accelerator: Accelerator = "auto",
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    runtime: Annotated[RuntimeKind, typer.Option(help=RUNTIME_HELP)] = RuntimeKind.EAGER,
) -> None:
    """Train models on your images under the same budget, measure them, and recommend one.

    Interrupted or killed, the same command continues, on either engine.
    """
    from vitarium.cli.board import Board
    from vitarium.reports.names import default_models, default_recipe
    from vitarium.training import load_recipe
    from vitarium.verbs.compare import chosen
    from vitarium.verbs.compare import compare as run

    recipe = recipe or default_recipe(data)
    names = chosen(models, recipe) if models is not None else None
    with Board(names or default_models(load_recipe(recipe))) as board:
        comparison = run(
            data,
            names,
            steps=steps,
            epochs=epochs,
            minutes=minutes,
            image_size=image_size,
            recipe=recipe,
            batch_size=batch_size,
            val_fraction=val_fraction,
            pretrained=pretrained,
            seed=seed,
            out=out_folder,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            accelerator=accelerator,
            engine=engine,
            address=address,
            jobs=jobs,
            runtime=runtime.value,
            progress=board,
            notify=board.note,
        )
    show(comparison)


def show(comparison: Comparison) -> None:
    """Print the table of a comparison, the failures, and the recommendation."""
    from vitarium.verbs.compare import baselines, cells, headers

    console = out()
    winner, worth = comparison.recommendation.model, comparison.recommendation.beats_baselines
    rows = table(*headers(comparison))
    for texts in baselines(comparison):
        rows.add_row(*texts, style="dim")
    for row in comparison.table():
        rows.add_row(*cells(row, comparison.metric), style="bold green" if worth and row["name"] == winner else None)
    console.print()
    console.print(rows)
    for failure in comparison.failures:
        console.print(f"{failure.name} failed: ", style="red", markup=False, end="")
        console.print(failure.error, markup=False)
    if bad := comparison.bad_files:
        console.print(f"[yellow]{len(bad)} images could not be read[/], the first: ", end="")
        console.print(f"{bad[0]['path']} ({bad[0]['reason']})", markup=False)
    for warning in comparison.warnings:
        console.print(f"{warning[0].upper()}{warning[1:]}.", style="yellow", markup=False)
    console.print(f"\n{comparison.recommendation}\n", style="bold", markup=False)
    file = next(comparison.folder / trial.file for trial in comparison.trials if trial.name == winner)
    use = {"use it": comparison.parsed_task().usage.format(file=shlex.quote(str(file)))} if worth else {}
    console.print(pairs({"report": comparison.report, "model": file, **use}))
