"""`vitarium index`: an index of images, to be searched by an image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, pairs, print_json, status
from vitarium.cli.options import Address, BatchSize, Checkpoint, Device, EngineKind, Jobs, ModelOption, Runtime, RuntimeKind


@configurable
def index(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders that are searched to the bottom, and images.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the index; one that is there is brought up to date.")],
    checkpoint: Checkpoint = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    runtime: Runtime = RuntimeKind.EAGER,
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Make an index of images, to be searched with `vitarium search`. Any image model works; one from 'train vpt_proxies' is best.

    A second call reads only new and changed images and drops deleted ones; an interrupted call resumes. Unreadable images are listed and
    skipped (exit code 3 if none can be read).
    """
    from vitarium.verbs.index import index as run

    with status() as notify:
        found = run(
            folders,
            model,
            output,
            checkpoint=checkpoint,
            batch_size=batch_size,
            device=device,
            runtime=runtime.value,
            engine=engine,
            address=address,
            jobs=jobs,
            notify=notify,
        )
    for row in found.broken:
        err().print(f"skipped {row['image']}: {row['error']}", markup=False, style="yellow", soft_wrap=True)
    if as_json:
        print_json(found.to_dict())
    else:
        out().print(pairs({**found.facts(), "use it": f"vitarium search {shlex.quote(str(output))} IMAGE"}))
