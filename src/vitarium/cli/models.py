"""`vitarium models`: list models by name, room and cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.catalog.filters import Condition, parse
from vitarium.catalog.index import read_index
from vitarium.catalog.search import cost_of, find_models, holds
from vitarium.cli.completion import complete_model, complete_room
from vitarium.cli.console import err, out, print_json, short, table
from vitarium.errors import UsageError, VitariumError, nearest

if TYPE_CHECKING:
    from vitarium.catalog.index import Cost


def models(
    pattern: Annotated[
        str,
        typer.Argument(
            help="Part of a name, or a shell pattern such as '*_pico'; 'timm/...' searches timm's.", autocompletion=complete_model
        ),
    ] = "*",
    room: Annotated[str | None, typer.Option(help="Only models of this room, such as 'backbones'.", autocompletion=complete_room)] = None,
    fits: Annotated[
        list[str] | None,
        typer.Option(help="Only models of such a cost: params, macs, gmacs or mb (10^6 bytes), as 'params<30M'. Repeatable."),
    ] = None,
    macs: Annotated[bool, typer.Option("--macs", help="Show multiply-accumulates too.")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image for MACs, pixels.", show_default="each model's own")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Build each model without weights and count; the default is to read the index.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List models: ours, and the small ones of timm's that comparisons use. Every other model of timm's works by the name timm/NAME."""
    conditions = [parse(text) for text in fits or []]
    rows = find_models(pattern, room, timm=True)
    if not rows:
        raise UsageError(f"no model matches {pattern!r}{nearest(pattern.strip('*'), known_names())}")
    need_macs = macs or any(c.quantity == "macs" for c in conditions)
    costs, refused = _costs(rows, image_size, measure, conditions)
    if refused and len(refused) == len(rows):
        raise next(iter(refused.values()))
    kept = [row for row in rows if row["name"] in costs and holds(costs[row["name"]], conditions)]
    _print_notes(pattern, image_size, costs, list(refused), need_macs)
    if as_json:
        return print_json([{**row, **_values(costs[row["name"]], need_macs)} for row in kept])
    _print([(row, costs[row["name"]]) for row in kept], len(rows), need_macs)


def known_names() -> list[str]:
    """Return the names of the models in the index, ours and foreign ones."""
    index = read_index()
    return [*index.models, *index.foreign]


def _costs(
    rows: list[dict[str, Any]], image_size: int | None, measure: bool, conditions: Sequence[Condition]
) -> tuple[dict[str, Cost], dict[str, VitariumError]]:
    """Return the cost of each model, and the error of each that cannot be built for the image size."""
    costs: dict[str, Cost] = {}
    refused: dict[str, VitariumError] = {}
    with err().status("") as status:
        for row in rows:
            name = row["name"]
            try:
                cost = None if measure else cost_of(name, image_size)
                if cost is None:
                    from vitarium.verbs.measuring import measure_cost

                    status.update(f"Building {name} without weights")
                    cost = measure_cost(name, image_size, conditions=conditions)
                costs[name] = cost
            except VitariumError as error:
                if image_size is None:
                    raise
                refused[name] = error
    return costs, refused


def _values(cost: Cost, macs: bool) -> dict[str, Any]:
    values = {"params": cost.params, "bytes": cost.bytes, "image_size": cost.image_size}
    return values | ({"macs": cost.macs} if macs else {})


def _print_notes(pattern: str, image_size: int | None, costs: dict[str, Cost], refused: list[str], macs: bool) -> None:
    if refused:
        err().print(f"Left out, as they cannot be built for {image_size} pixels: {', '.join(refused)}", style="dim", markup=False)
    unknown = [name for name, cost in costs.items() if cost.unknown & ({"params", "bytes"} | ({"macs"} if macs else set()))]
    if unknown:
        command = f"vitarium models {shlex.quote(pattern)} --image-size {image_size} --measure"
        few = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        note = f"Not in the index at {image_size} pixels, shown as ?: {few}. To measure them: {command}"
        err().print(note, style="dim", markup=False, soft_wrap=True)


def _print(rows: list[tuple[dict[str, Any], Cost]], searched: int, macs: bool) -> None:
    result = table("model", "family", ">params", *([">MACs"] if macs else []), ">image")
    for row, cost in rows:
        counted = [shown(cost, "macs")] if macs else []
        result.add_row(row["name"], row["family"], shown(cost, "params"), *counted, f"{cost.image_size} px")
    console = out()
    if rows:
        console.print(result)
    console.print(f"{len(rows)} of {searched} models fit" if len(rows) < searched else f"{len(rows)} models", style="dim")


def shown(cost: Cost, quantity: str) -> str:
    """Return a quantity of a cost as text: three digits, "-" if it does not exist, "?" if the index does not hold it."""
    return "?" if quantity in cost.unknown else short(getattr(cost, quantity))
