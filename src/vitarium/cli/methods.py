"""`vitarium methods`: the methods that make a model cheaper or adapt it, and which fit a model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from vitarium.cli.completion import complete_weights
from vitarium.cli.console import note, print_json, print_tables


class Family(StrEnum):
    """Families of methods."""

    PRUNING = "pruning"
    TOKENS = "tokens"
    ADAPTATION = "adaptation"
    QUANTIZATION = "quantization"
    EXPLANATION = "explanation"


class Need(StrEnum):
    """Requirements of a method beside a trained model."""

    NONE = "none"
    IMAGES = "images"
    REQUIRED = "required"


def methods(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|FILE]",
            help="A model's name or file: say which methods fit it.",
            autocompletion=complete_weights,
            show_default="the list alone",
        ),
    ] = None,
    family: Annotated[Family | None, typer.Option(help="Only methods of this family.")] = None,
    training: Annotated[
        Need | None, typer.Option(help="Only methods that need this beside a trained model: none, images to calibrate, training.")
    ] = None,
    options: Annotated[bool, typer.Option("--options", help="Describe every option.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the methods of --apply with their options; with a model, say which fit it, and why others do not."""
    from vitarium.verbs.methods import methods as run

    found = run(model, family=family and family.value, training=training and training.value, options=options)  # type: ignore[arg-type]
    if as_json:
        return print_json(found.to_dict())
    print_tables(found.tables())
    if not options:
        note("--options describes every option; --apply METHOD:KEY=VALUE,... sets them.")
