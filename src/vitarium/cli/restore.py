"""`vitarium restore`: larger or better images by a trained restorer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, print_json, print_tables, status
from vitarium.cli.options import Checkpoint, Device, ModelOption


@configurable
def restore(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, and folders that are searched to the bottom.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results, written as PNG.")],
    checkpoint: Checkpoint = None,
    tile: Annotated[int, typer.Option(min=0, help="Side of the tiles, pixels of the input; memory grows with it. 0: no tiles.")] = 256,
    overlap: Annotated[int, typer.Option(min=0, help="Overlap of neighbouring tiles, pixels of the input.")] = 32,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Mean of the results in 8 orientations (flips, rotations): 8 times the time.")
    ] = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Restore images of any size, tile by tile. Unreadable ones are listed and skipped (exit code 3 if none can be read)."""
    from vitarium.verbs.restore import restore as run

    with status() as notify:
        found = run(
            images, model, output, checkpoint=checkpoint, tile=tile, overlap=overlap, ensemble=ensemble, device=device, notify=notify
        )
    if as_json:
        print_json(found.rows)
    else:
        print_tables(found.tables())
    if found.broken:
        err().print(f"[yellow]{len(found.broken)} of {len(found.rows)} images could not be restored[/]")
