"""`vitarium predict`: predictions of a model for images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.console import err, out, print_json, print_tables, status
from vitarium.cli.options import Address, Apply, BatchSize, Checkpoint, Device, EngineKind, Jobs, ModelOption, Runtime, RuntimeKind

SHOWN = 10
"""Images that could not be read whose reasons are printed."""
ROWS = 20
"""Rows of the table if all are written to a file."""


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, and folders that are searched to the bottom.")],
    model: ModelOption,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    top_k: Annotated[int, typer.Option(min=1, help="Length of ranked answers, such as the most probable classes.")] = 5,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    runtime: Runtime = RuntimeKind.EAGER,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write, .csv or .json; or a folder for answers.json and drawings.", show_default="none"
        ),
    ] = None,
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict for images: labels, segments, ... Unreadable ones are listed and counted (exit code 3 if none can be read)."""
    from vitarium.verbs.predict import answer_table
    from vitarium.verbs.predict import predict as run

    with status() as notify:
        found = run(
            images,
            model,
            checkpoint=checkpoint,
            apply=methods,
            top_k=top_k,
            batch_size=batch_size,
            device=device,
            runtime=runtime.value,
            output=output,
            engine=engine,
            address=address,
            jobs=jobs,
            notify=notify,
        )
    if as_json:
        print_json(found.rows)
    else:
        first = found.rows if output is None else found.rows[:ROWS]
        print_tables([answer_table(first, found.task)])
        if len(first) < len(found.rows):
            out().print(f"... {len(found.rows) - len(first)} more in {output}", markup=False, soft_wrap=True)
    if found.broken:
        err().print(f"[yellow]{len(found.broken)} of {len(found.rows)} images could not be read[/]")
        for row in found.broken[:SHOWN]:
            err().print(f"  {row['image']}: {row['error']}", markup=False, soft_wrap=True)
    if output is not None:
        err().print(f"written: {output}", markup=False, style="dim")
