"""`vitarium compress`: a model made cheaper by methods, written to one file, and compared with the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.completion import complete_data, complete_method
from vitarium.cli.config import configurable
from vitarium.cli.console import err, note, print_json, print_tables, status
from vitarium.cli.options import DATA_HELP, BatchSize, Checkpoint, Device, ModelArgument

if TYPE_CHECKING:
    from vitarium.verbs.compress import Compression


@configurable
def compress(
    model: ModelArgument,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--apply",
            metavar="METHOD:KEY=VALUE,...",
            help="What to do, as mptq_vit:bits=6 or tome:r=8. Repeatable, in order. Without it, those that fit are listed.",
            autocompletion=complete_method,
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, .safetensors; `vitarium.load` opens it.")],
    data: Annotated[
        str | None, typer.Option(help=f"{DATA_HELP} For calibration and accuracy.", autocompletion=complete_data, show_default="none")
    ] = None,
    checkpoint: Checkpoint = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.", show_default="the training's, else 0.2"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the split.", show_default="the training's, else 0")] = None,
    batch_size: BatchSize = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images per call when time is measured.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Time both under torch.compile too (takes a minute or two).")] = False,
    compile_limit: Annotated[float, typer.Option(min=1, help="Seconds after which a compilation is given up.")] = 240.0,
    device: Device = "cpu",
    report: Annotated[Path | None, typer.Option(help="JSON file for the table.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Apply methods to a trained model, write one loadable file, and compare before and after: primary metric, size, time, MACs.

    A result that is slower is said first, with the size from which each method pays on this machine. Methods that calibrate see training
    images; the metric is taken on the held-out part, of the model as loaded from the file.
    """
    from vitarium.files import check_output, write_json
    from vitarium.verbs.compress import compress as run
    from vitarium.verbs.result import kept

    check_output(report)
    with status() as notify:
        found = run(
            model,
            methods or [],
            output,
            data,
            checkpoint=checkpoint,
            val_fraction=val_fraction,
            seed=seed,
            batch_size=batch_size,
            batch=batch,
            compiled=compiled,
            compile_limit=compile_limit,
            device=device,
            notify=notify,
        )
    if report is not None:
        with kept(found):
            write_json(report, found.to_dict())
    if as_json:
        print_json(found.to_dict())
    else:
        print_tables(found.tables())
    remarks(found)


def remarks(found: Compression) -> None:
    """Print what the table does not show."""
    if (slow := found.quantized) is not None and (slow["simulated"] or slow["unpacked"]):
        err().print(
            f"Of {slow['layers']} quantized layers {slow['simulated']} are simulated in floating point and {slow['unpacked']} unpack "
            "weights under 8 bits at each call: that saves memory and disk, not time.",
            style="yellow",
            markup=False,
        )
    if found.data is None:
        note("Give --data to see what it costs in accuracy.")
    note(f"written: {found.file}")
