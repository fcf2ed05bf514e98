"""`vitarium push`: a model and its card on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.console import out, pairs, print_json, status


def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `vitarium.save` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hugging Face hub; it is created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository so that only you see it.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, as apache-2.0.", show_default="the card says that it is not recorded")
    ] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Push with vitarium",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for what would be pushed; nothing is pushed.", show_default="none"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Push a model and its model card to the Hugging Face hub, with the login of `hf auth login`."""
    from vitarium.verbs.push import push as run

    with status() as notify:
        pushed = run(file, repository, private=private, license=license, message=message, output=output, notify=notify)
    if as_json:
        print_json(pushed.to_dict())
    else:
        out().print(pairs(pushed.facts()))
