"""`vitarium generate`: images of classes by a trained generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import out, pairs, print_json, status
from vitarium.cli.options import Address, Apply, Checkpoint, Device, EngineKind, Jobs, ModelArgument


@configurable
def generate(
    model: ModelArgument,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names, or numbers from 0 as #3; as cat,#3-5. A plain 3 is a name if any name is a number. A comma in a name: \\,",
            show_default="all, at most ten",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images of each class.")] = 4,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A sheet (.png, .jpg, .webp), an array for FID evaluators (.npz), or a folder."),
    ] = Path("samples.png"),
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler.", show_default="the model's")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of classifier-free guidance; 1: none.", show_default="the model's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model, as sampler=heun. Repeatable.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="An image of which a region is generated again; with --mask.")] = None,
    mask: Annotated[Path | None, typer.Option(help="An image of the same size, white where new pixels are generated.")] = None,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once; they do not depend on it.")] = 64,
    device: Device = "auto",
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Generate images of classes with a trained generator: a denoiser, or an autoregressive model."""
    from vitarium.verbs.generate import generate as run

    with status() as notify:
        found = run(
            model,
            classes,
            count,
            output,
            steps=steps,
            guidance=guidance,
            seed=seed,
            options=options,
            image=image,
            mask=mask,
            checkpoint=checkpoint,
            apply=methods,
            batch_size=batch_size,
            device=device,
            engine=engine,
            address=address,
            jobs=jobs,
            notify=notify,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        out().print(pairs(found.facts()))
