"""`vitarium search`: the images of an index most similar to an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.completion import complete_weights
from vitarium.cli.config import configurable
from vitarium.cli.console import err, print_json, print_tables, status
from vitarium.cli.options import BatchSize, Checkpoint, Device, Runtime, RuntimeKind


@configurable
def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="A file that `vitarium index` wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, and folders that are searched to the bottom.")],
    top_k: Annotated[int, typer.Option(min=1, help="Images to find for each, the most similar first.")] = 5,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FILE",
            autocompletion=complete_weights,
            help="The model of the index.",
            show_default="where it was when it was indexed",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    itself: Annotated[bool, typer.Option("--itself", help="Also find a query that is in the index itself.")] = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    runtime: Runtime = RuntimeKind.EAGER,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write: .png or .jpg, a sheet of images; .json.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the images of an index that are most similar to given ones, by the cosine of their vectors (1: equal).

    Unreadable images are listed and skipped (exit code 3 if none can be read).
    """
    from vitarium.verbs.search import search as run

    with status() as notify:
        found = run(
            index,
            images,
            top_k=top_k,
            model=model,
            checkpoint=checkpoint,
            itself=itself,
            batch_size=batch_size,
            device=device,
            runtime=runtime.value,
            output=output,
            notify=notify,
        )
    if as_json:
        print_json(found.rows)
    else:
        print_tables(found.tables())
    if found.broken:
        err().print(f"[yellow]{len(found.broken)} of {len(found.rows)} images could not be read[/]")
    if output is not None:
        err().print(f"written: {output}", markup=False, style="dim")
