"""`vitarium bench`: our speed beside the best public implementation of the same model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, print_json, short, table
from vitarium.cli.opening import quiet
from vitarium.cli.options import Device
from vitarium.verbs.opening import find_device

if TYPE_CHECKING:
    from rich.table import Table

    from vitarium.efficiency.bench import Row


class Kind(StrEnum):
    """What is timed."""

    INFERENCE = "inference"
    TRAINING = "training"
    COMPILED = "compiled"


class Dtype(StrEnum):
    """Of weights and image."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@configurable
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Models' names: ours, timm/NAME, hf/OWNER/NAME, hf/./folder.")],
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the peer too, on the same weights.")] = True,
    kind: Annotated[list[Kind], typer.Option(help="Forward, forward and backward, or forward under torch.compile. Repeatable.")] = [  # noqa: B006
        Kind.INFERENCE,
        Kind.TRAINING,
    ],
    batch: Annotated[list[int], typer.Option(min=1, help="Images a call; training takes the largest. Repeatable.")] = [1, 8],  # noqa: B006
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image, pixels.", show_default="what each model was made for")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and image.")] = Dtype.FLOAT32,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="Turns of each arm; 7 resolve about 5 % on a noisy machine.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on a CPU; more than there are free cores slow everything down.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time models beside their peers: equal weights, outputs proven equal first, turns interleaved, no verdict inside the noise."""
    import torch

    from vitarium.efficiency.bench import bench as run

    found = run(
        models,
        peers=peers,
        kinds=[k.value for k in kind],
        batches=batch,
        image_size=image_size,
        dtype=getattr(torch, dtype.value),
        device=str(find_device(device)),
        rounds=rounds,
        threads=threads,
    )
    with quiet():
        if as_json:
            return print_json([row.to_dict() for row in found])
        show(found)


def show(rows: Iterator[Row]) -> None:
    """A table that grows as it is measured; then how to read it."""
    from rich.live import Live

    with err().status("Measuring the first"):
        row = next(rows)
    result, console = table("~model", "~peer", "kind", ">batch", ">ours", ">peer", ">peer / ours", ">ours / ours", "verdict"), out()
    add(result, row)
    with Live(result, console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        for row in rows:
            add(result, row)
            if live is not None:
                live.refresh()
    if not console.is_terminal:
        console.print(result)
    time = "processor time" if row.device == "cpu" else "time"
    told = f"Medians of {row.rounds} rounds [least, most] of {time} a call; {row.dtype} on {row.device}, {row.threads} threads"
    err().print(f"{told}, load {row.load:.1f}.", style="dim", markup=False)


def add(result: Table, row: Row) -> None:
    """A measurement as a line."""
    colour = "green" if "faster" in row.verdict else "red" if "slower" in row.verdict else "dim"
    result.add_row(
        f"{row.model} [dim]{short(row.params)}, {short(row.macs)} MACs[/]",
        row.peer or "-",
        row.kind,
        str(row.batch),
        f"{row.ours_ms:.2f} ms",
        "-" if row.peer_ms is None else f"{row.peer_ms:.2f} ms",
        spread(row.ratio, row.ratio_low, row.ratio_high),
        spread(row.aa, row.aa_low, row.aa_high),
        f"[{colour}]{row.verdict}[/]",
    )


def spread(median: float | None, low: float | None, high: float | None) -> str:
    """ "1.20 [1.15, 1.31]"."""
    return "-" if median is None else rf"{median:.2f} \[{low:.2f}, {high:.2f}]"
