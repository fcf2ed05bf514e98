"""`vitarium models`: the models that there are, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli import filters
from vitarium.cli.console import err, out, print_json, short, table
from vitarium.cli.opening import describe_model, matcher
from vitarium.cli.systems import check_room, in_room
from vitarium.errors import InputError, UsageError, VitariumError, nearest

if TYPE_CHECKING:
    from torch import nn


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a shell pattern such as '*_pico'; 'timm/...' searches timm's.")] = "*",
    room: Annotated[str | None, typer.Option(help="Only models of this room, such as 'backbones'.")] = None,
    fits: Annotated[
        list[str] | None,
        typer.Option(help="Only models of such a cost: params, macs, gmacs or mb (10^6 bytes), as 'params<30M'. Repeatable."),
    ] = None,
    macs: Annotated[bool, typer.Option("--macs", help="Count multiply-accumulates too (each model runs once, without weights).")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image for MACs, pixels.", show_default="each model's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List models: ours, and the small ones of timm's that comparisons use. Every other model of timm's works by the name timm/NAME."""
    conditions = [filters.parse(text) for text in fits or []]
    rows = find(pattern, room)
    if not rows:
        raise UsageError(f"no model matches {pattern!r}{nearest(pattern.strip('*'), [r['name'] for r in find('*', None)])}")
    need_macs = macs or any(c.quantity == "macs" for c in conditions)
    refused: dict[str, VitariumError] = {}
    with err().status("Building the models without weights") as status:
        for row in rows:
            status.update(f"Building {row['name']} without weights")
            try:
                row.update(cost(row["name"], need_macs, image_size, conditions))
            except VitariumError as error:
                if image_size is None:
                    raise
                refused[row["name"]] = error
    built = [r for r in rows if r["name"] not in refused]
    if not built:
        raise next(iter(refused.values()))
    kept = [r for r in built if holds(r, conditions)]
    if refused:
        err().print(f"Left out, as they cannot be built for {image_size} pixels: {', '.join(refused)}", style="dim", markup=False)
    if as_json:
        return print_json(kept)
    _print(kept, len(rows), need_macs)


def find(pattern: str, room: str | None) -> list[dict[str, Any]]:
    """Name, family, room, objective and frames (of a video model's clip) of the models that a pattern matches, ours first."""
    from vitarium.catalog import families
    from vitarium.catalog.foreign import TIMM_PICO

    check_room(room)
    rows: list[dict[str, Any]] = [
        {"name": f"{f.name}_{variant}", "family": f.name, "room": f.room, "learner": f.learner, "frames": f.variants[variant].get("frames")}
        for f in families()
        for variant in f.variants
    ]
    of_timm: dict[str, Any] = {"family": "timm", "room": "backbones", "learner": "classification", "frames": None}
    rows += [{"name": f"timm/{name}", **of_timm} for name in TIMM_PICO]
    if pattern.startswith("timm/"):
        import timm

        rows += [{"name": f"timm/{name}", **of_timm} for name in timm.list_models()]
    wanted = matcher(pattern)
    return [r for r in rows if wanted.match(r["name"]) and in_room(r["room"], room)]


def cost(name: str, macs: bool, image_size: int | None, conditions: Sequence[filters.Condition] = ()) -> dict[str, Any]:
    """Parameters, bytes, image size and, if asked for, MACs of a model that is built without weights.

    MACs take longest, and are not counted where the model fails another of the conditions.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.efficiency.profiler import count_params, weight_bytes

    model = describe_model(name, **({} if image_size is None else {"image_size": image_size}))
    size = image_size or preprocessing_of(model).image_size
    row: dict[str, Any] = {"params": count_params(model), "bytes": weight_bytes(model), "image_size": size}
    if macs:
        may_fit = holds(row, [c for c in conditions if c.quantity != "macs"])
        row["macs"] = macs_of(model, size) if may_fit else None
    return row


def holds(row: dict[str, Any], conditions: Sequence[filters.Condition]) -> bool:
    """Whether a model's cost passes all conditions."""
    return all(c.holds(row["bytes" if c.quantity == "mb" else c.quantity]) for c in conditions)


def macs_of(model: nn.Module, image_size: int) -> int | None:
    """MACs of one image; None for a model that takes no such image (another size, clips) or more than an image (a step, a class)."""
    from vitarium.efficiency.profiler import count_macs

    try:
        return count_macs(model, image_size)
    except (InputError, TypeError):
        return None


def _print(rows: list[dict[str, Any]], searched: int, macs: bool) -> None:
    result = table("model", "family", ">params", *([">MACs"] if macs else []), ">image")
    for row in rows:
        counted = [short(row["macs"])] if macs else []
        result.add_row(row["name"], row["family"], short(row["params"]), *counted, f"{row['image_size']} px")
    console = out()
    if rows:
        console.print(result)
    console.print(f"{len(rows)} of {searched} models fit" if len(rows) < searched else f"{len(rows)} models", style="dim")
