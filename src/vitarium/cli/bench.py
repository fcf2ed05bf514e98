"""`vitarium bench`: speed beside the best public implementation of the same model."""

from __future__ import annotations

from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from vitarium.cli.completion import complete_model
from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, print_json, table
from vitarium.cli.options import Device, RuntimeKind
from vitarium.verbs.measuring import quiet

if TYPE_CHECKING:
    from vitarium.efficiency.bench import Row


class Kind(StrEnum):
    """Kinds of timing."""

    INFERENCE = "inference"
    TRAINING = "training"
    COMPILED = "compiled"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


class Dtype(StrEnum):
    """Number formats of weights and image."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@configurable
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Names (ours, timm/NAME, hf/OWNER/NAME, hf/./folder) or files that `vitarium.save` wrote.",
            autocompletion=complete_model,
        ),
    ],
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the peer too, on the same weights.")] = True,
    kind: Annotated[
        list[Kind] | None,
        typer.Option(
            help="Forward, forward and backward, or forward in another runtime. Repeatable.",
            show_default="the runtimes, else inference and training",
        ),
    ] = None,
    runtime: Annotated[
        list[RuntimeKind] | None,
        typer.Option(help="What executes the forward passes, of the peer, too: short for a kind. Repeatable.", show_default="eager"),
    ] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Images per call; training takes the largest. Repeatable.")] = [1, 8],  # noqa: B006
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image, pixels.", show_default="what each model was made for")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and image.")] = Dtype.FLOAT32,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="Turns of each arm; 7 resolve about 5 % on a noisy machine.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on a CPU; more than there are free cores slow everything down.")] = 1,
    compile_limit: Annotated[float, typer.Option(min=1, help="Seconds after which the compilation of a model is given up.")] = 240.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time models beside their peers: equal weights, outputs checked to be equal, turns interleaved, no verdict within the noise."""
    from vitarium.verbs.bench import bench as run

    with quiet(), Growing(live=not as_json) as growing:
        found = run(
            models,
            peers=peers,
            kind=[k.value for k in kind or ()],
            runtime=[r.value for r in runtime or ()],
            batch=batch,
            image_size=image_size,
            dtype=dtype.value,
            device=device,
            rounds=rounds,
            threads=threads,
            compile_limit=compile_limit,
            progress=growing.add,
        )
    if as_json:
        return print_json([row.to_dict() for row in found.rows])
    growing.finish(found.rows[-1])


class Growing:
    """A table that grows on the terminal as rows are measured; otherwise it is printed at the end.

    Args:
        live: show it.
    """

    def __init__(self, *, live: bool):
        from rich.live import Live

        from vitarium.verbs.bench import COLUMNS

        self.console, self.table = out(), table(*COLUMNS)
        self.waiting = err().status("Measuring the first")
        self.live = Live(self.table, console=self.console, auto_refresh=False) if live and self.console.is_terminal else None

    def __enter__(self) -> Growing:
        self.waiting.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.waiting.stop()
        if self.live is not None:
            self.live.stop()

    def add(self, row: Row) -> None:
        """Add a measurement."""
        from vitarium.verbs.bench import cells

        *shown, verdict = map(escape, cells(row))
        colour = "green" if "faster" in verdict else "red" if "slower" in verdict else "dim"
        self.table.add_row(*shown, f"[{colour}]{verdict}[/]")
        self.waiting.stop()
        if self.live is not None:
            self.live.start()
            self.live.refresh()

    def finish(self, row: Row) -> None:
        """Print the table if it was not live, and its legend."""
        if self.live is None:
            self.console.print(self.table)
        time = "processor time" if row.device == "cpu" else "time"
        text = f"Medians of {row.rounds} rounds [least, most] of {time} a call; {row.dtype} on {row.device}, {row.threads} threads"
        err().print(f"{text}, load {row.load:.1f}.", style="dim", markup=False)
