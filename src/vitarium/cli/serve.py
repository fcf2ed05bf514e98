"""`vitarium serve`: a model over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.console import err, status
from vitarium.cli.options import Apply, Checkpoint, Device, ModelArgument, Runtime, RuntimeKind
from vitarium.errors import UsageError

LIMITS = "Limits"
ACCESS = "Access"
TOKEN = "VITARIUM_TOKEN"
"""Environment variable of the token."""


def serve(
    model: ModelArgument,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    device: Device = "auto",
    runtime: Runtime = RuntimeKind.EAGER,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine only.", rich_help_panel=ACCESS)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=ACCESS)] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that clients must send.", show_default=f"${TOKEN}, else no token is needed", rich_help_panel=ACCESS
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Length of ranked answers where a request sets none.")] = 5,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at once. Above 1, the last bits of an answer can depend on the others of its batch.")
    ] = 1,
    max_wait: Annotated[float, typer.Option(min=0, help="Milliseconds to wait for a fuller batch.", rich_help_panel=LIMITS)] = 5,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait; beyond, clients get 429.", rich_help_panel=LIMITS)] = 64,
    limit_mb: Annotated[float, typer.Option(help="Largest request, megabytes.", rich_help_panel=LIMITS)] = 20,
    limit_megapixels: Annotated[float, typer.Option(help="Largest image, megapixels.", rich_help_panel=LIMITS)] = 50,
    timeout: Annotated[float, typer.Option(help="Seconds for an answer; then clients get 504.", rich_help_panel=LIMITS)] = 60,
) -> None:
    """Serve a model over HTTP: /predict, /draw, /info, /healthz, /metrics, and a page to drop images on. Ctrl-C ends it."""
    from vitarium.verbs.serve import serve as run

    with status() as notify:
        served = run(
            model,
            host=host,
            port=port,
            checkpoint=checkpoint,
            apply=methods,
            device=device,
            runtime=runtime.value,
            token=read_token(token_file),
            notify=notify,
            top_k=top_k,
            batch_size=batch_size,
            max_wait=max_wait,
            max_queue=max_queue,
            limit_mb=limit_mb,
            limit_megapixels=limit_megapixels,
            timeout=timeout,
        )
    facts = served.facts()
    err().print(f"stopped after {facts['seconds']} seconds; requests: {facts['requests']}", markup=False, style="dim")


def read_token(file: Path | None) -> str | None:
    """Return the token of a file or of the environment; None without both."""
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read the token in {file}: {error}") from error
