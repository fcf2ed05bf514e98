"""`vitarium recipes`: the library's recipes, by task and model."""

from __future__ import annotations

from typing import Annotated

import typer

from vitarium.cli.completion import complete_model, complete_task
from vitarium.cli.console import print_json, print_tables


def recipes(
    model: Annotated[
        str | None, typer.Argument(help="A model's name: only recipes of its task.", autocompletion=complete_model, show_default="all")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only recipes of this task, such as classify.", autocompletion=complete_task)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the recipes that `vitarium train` takes: task, learner, model, and what each trains."""
    from vitarium.verbs.recipes import recipes as run

    found = run(model, task=task)
    if as_json:
        print_json(found.to_dict())
    else:
        print_tables(found.tables())
