"""`vitarium recipes`: the library's recipes, by task and model; and every setting of one."""

from __future__ import annotations

from typing import Annotated

import typer

from vitarium.cli.completion import complete_recipe_or_model, complete_task
from vitarium.cli.console import print_json, print_tables


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name: all of its settings. A model's name: only recipes of its task.",
            autocompletion=complete_recipe_or_model,
            show_default="all",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only recipes of this task, such as classify.", autocompletion=complete_task)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the recipes that `vitarium train` takes: task, learner, model, and what each trains; or every setting of one, with defaults."""
    from vitarium.verbs.recipes import recipes as run

    found = run(name, task=task)
    if as_json:
        print_json(found.to_dict())
    else:
        print_tables(found.tables())
