"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from vitarium.cli.completion import complete_method, complete_weights

MACHINE = "Machine"


class RuntimeKind(StrEnum):
    """Names of `vitarium.efficiency.runtimes.RUNTIMES`."""

    EAGER = "eager"
    COMPILE = "compile"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


MODEL_HELP = "A file that `vitarium.save` wrote, or a model's name."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL|FILE", help=MODEL_HELP, autocompletion=complete_weights)]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL|FILE", help=MODEL_HELP, autocompletion=complete_weights)]

DATA_HELP = (
    "Images: fashion, digits, photos, scenes (embedded:NAME where a folder has the name), a folder of class folders, a CSV file, "
    "WebDataset shards, or a saved Hugging Face dataset."
)
DataSpec = Annotated[str, typer.Option(help=DATA_HELP)]
Apply = Annotated[
    list[str] | None,
    typer.Option(
        "--apply",
        metavar="METHOD:KEY=VALUE,...",
        help="A method for the model, as evit:keep=0.7. Repeatable, in order.",
        autocompletion=complete_method,
    ),
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the model's input, pixels.", show_default="the images' or model's own")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one.")]
Runtime = Annotated[
    RuntimeKind, typer.Option(help="What executes the model: PyTorch, torch.compile, or its exported graph, which is kept beside its file.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]
Checkpoint = Annotated[
    str | None, typer.Option(help="Weights for a model's name: file, hf:OWNER/NAME, or address.", show_default="the published ones")
]
Devices = Annotated[int, typer.Option(min=1, help="Processes on this machine, one per device, data-parallel.", rich_help_panel=MACHINE)]
NumNodes = Annotated[int, typer.Option(min=1, help="Machines (started by torchrun or SLURM).", rich_help_panel=MACHINE)]
Strategy = Annotated[str, typer.Option(help="How processes share the work: auto, ddp or fsdp.", rich_help_panel=MACHINE)]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=MACHINE)]
EngineKind = Annotated[
    str,
    typer.Option(
        "--engine", help="Where the work runs: local (this machine) or ray (a Ray cluster; extra: cluster).", rich_help_panel=MACHINE
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Of a running Ray cluster: auto or HOST:PORT.", show_default="Ray starts here", rich_help_panel=MACHINE),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Runs or model processes at a time.", show_default="1; what the cluster takes", rich_help_panel=MACHINE),
]
