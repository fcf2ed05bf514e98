"""`vitarium explain`: maps of the evidence in an image for a class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitarium.catalog.index import read_index
from vitarium.cli.completion import complete_explainer
from vitarium.cli.console import err, print_json, print_tables, status
from vitarium.cli.options import Apply, Checkpoint, Device, ModelOption
from vitarium.errors import UsageError, nearest


def known(methods: list[str] | None) -> list[str] | None:
    """Check the names of methods, before typer reports options that are missing.

    Raises:
        UsageError: an unknown name.
    """
    names = read_index().names("explainers")
    for text in methods or []:
        if (name := text.partition(":")[0]) not in names:
            raise UsageError(f"unknown explanation method {name!r}{nearest(name, names)} (explanation methods: {', '.join(names)})")
    return methods


def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, and folders that are searched to the bottom.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for overlays and explanations.json.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="How to explain, as rise:masks=500. Repeatable.",
            show_default="grad_cam",
            callback=known,
            autocompletion=complete_explainer,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Class to explain, by name, or by number from 0 as #3.", show_default="predicted")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure how faithful each method is on these images.")] = False,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Draw the evidence in images for a classifier's prediction, or for a given class.

    Methods: t_tame (for a model of 'vitarium train t_tame'), grad_cam, rollout, gradient_input, rise, integrated_gradients, occlusion,
    smooth_grad, gradient_shap, token_tree (draws which patches depend on each other), and random as a baseline. Unreadable images are
    listed and skipped.
    """
    from vitarium.verbs.explain import REPORT
    from vitarium.verbs.explain import explain as run

    with status() as notify:
        found = run(
            images,
            model,
            output,
            method=method or ["grad_cam"],
            target=target,
            measure=measure,
            checkpoint=checkpoint,
            apply=methods,
            batch_size=batch_size,
            device=device,
            notify=notify,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        print_tables(found.tables())
    if found.broken:
        err().print(f"[yellow]{len(found.broken)} of {len(found.rows)} images could not be explained[/]")
    err().print(f"written: {output / REPORT} and the overlays beside it", markup=False, style="dim", soft_wrap=True)
