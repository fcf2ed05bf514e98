"""`vitarium info`: everything about one model, by name or from a saved file."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.catalog.index import at_size, read_index
from vitarium.catalog.search import list_models, unknown_model
from vitarium.catalog.systems import find_system
from vitarium.cli.completion import complete_weights
from vitarium.cli.console import out, pairs, print_json, short, table
from vitarium.files import is_model_file

if TYPE_CHECKING:
    from vitarium.catalog.index import Cost, Entry, IndexedFamily, Variant


def info(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|FILE", help="A model's name, or a file that `vitarium.save` wrote.", autocompletion=complete_weights),
    ],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image for MACs, pixels.", show_default="the model's own")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Build the model without weights and count; the default is to read the index.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a model: its arguments, variants, cost, stages, preprocessing and known weights; of a file, what it holds."""
    if is_model_file(model):
        from vitarium.cli.info_file import describe_file, print_file

        header = describe_file(model)
        (print_json if as_json else print_file)(header)
    else:
        report = describe(model, image_size, measure=measure)
        if as_json:
            return print_json({key: value for key, value in report.items() if key != "unknown"})
        _print(report)


def describe(name: str, image_size: int | None = None, *, measure: bool = False) -> dict[str, Any]:
    """Return the values that `info` prints.

    Args:
        name: of a model of the library, or of another's ("timm/NAME", "hf/OWNER/NAME").
        image_size: side of the image for the cost, pixels; None: the model's own.
        measure: build the model and count; models that the index does not hold are always built.

    Raises:
        UsageError: unknown model, or it cannot be built for this size.
    """
    bare = name if "/" in name else name.partition(".")[0]
    found = read_index().models.get(bare)
    if found is None:
        if "/" not in bare and bare not in list_models():
            raise unknown_model(bare)
        return _described_by_building(bare, image_size)
    family, variant = found
    if measure:
        from vitarium.cli.measuring import measure_cost

        cost = measure_cost(bare, image_size, memory=True)
    else:
        cost = variant.cost(image_size)
    entry = next(e for e in read_index().entries.values() if family.name in e.families)
    preprocessing = at_size(variant.preprocessing, cost.image_size, family.crop_pct) if image_size else dict(variant.preprocessing)
    return {
        "name": bare,
        "summary": entry.summary,
        **_cost(cost),
        "num_classes": variant.num_classes,
        "stages": [{"module": module, "channels": channels, "stride": stride} for module, channels, stride in variant.stages],
        "preprocessing": preprocessing,
        **_of_family(family, variant, entry),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    memory = None if cost.peak_memory is None else cost.peak_memory / 1e6
    values = {"params": cost.params, "bytes": cost.bytes, "macs": cost.macs, "peak_memory_mb": memory, "image_size": cost.image_size}
    return {**values, "unknown": sorted(cost.unknown)}


def _of_family(family: IndexedFamily, variant: Variant, entry: Entry) -> dict[str, Any]:
    given = variant.arguments
    arguments = [
        {
            "name": argument["name"],
            "value": given.get(argument["name"], argument["default"]),
            "set_by": "variant" if argument["name"] in given else "default",
            "help": argument["help"],
        }
        for argument in family.arguments
    ]
    return {
        "system": _system(family, entry),
        "arguments": arguments,
        "variants": [v.name for v in family.variants.values()],
        "weights": {tag: list(sources) for tag, sources in variant.weights.items()},
    }


def _described_by_building(name: str, image_size: int | None) -> dict[str, Any]:
    """Return the report of a model that the index does not hold: another library's, or one that this process registered."""
    from vitarium.catalog import preprocessing_of
    from vitarium.cli.index_costs import stages_of
    from vitarium.cli.indexing import first_paragraph
    from vitarium.cli.measuring import measure_cost
    from vitarium.cli.opening import describe_model

    model = describe_model(name, **({} if image_size is None else {"image_size": image_size}))
    return {
        "name": name,
        "summary": first_paragraph(type(model).__doc__),
        **_cost(measure_cost(name, image_size, memory=True)),
        "num_classes": getattr(model, "num_classes", None),
        "stages": stages_of(model),
        "preprocessing": preprocessing_of(model).to_dict(),
    }


def _system(family: IndexedFamily, entry: Entry) -> dict[str, str]:
    """Return the family's system; for a base that several systems use, its module."""
    if entry.slug == entry.module:
        return {"slug": family.slug, "title": entry.summary, "room": entry.module.split(".")[1], "authors_code": "none"}
    system = find_system(entry.slug)
    return {"slug": system.slug, "title": system.title, "room": system.room, "authors_code": system.authors_code}


def _print(report: dict[str, Any]) -> None:
    console = out()
    console.print(f"[bold]{report['name']}[/]  [dim]{report.get('system', {}).get('room', '')}[/]")
    console.print(report["summary"], markup=False)
    console.print()
    pre, unknown = report["preprocessing"], report["unknown"]
    rows = {"parameters": "?" if "params" in unknown else f"{short(report['params'])}  ({report['bytes'] / 1e6:.1f} MB)"}
    size = f"at {report['image_size']}x{report['image_size']} pixels"
    if "macs" in unknown or report["macs"] is not None:
        rows["MACs"] = f"{'?' if 'macs' in unknown else short(report['macs'])}  {size}"
        memory = "?" if "peak_memory" in unknown else f"{report['peak_memory_mb']:.1f} MB"
        rows["memory"] = f"{memory}  at most in one forward pass of one image"
    rows["classes"] = str(report["num_classes"])
    scale = f"mean {numbers(pre['mean'])}, std {numbers(pre['std'])}"
    rows["preprocessing"] = f"{pre['image_size']} px, {pre['interpolation']}, crop {pre['crop_pct']:g}, {scale}"
    console.print(pairs(rows))
    if unknown:
        command = f"vitarium info {shlex.quote(report['name'])} --image-size {report['image_size']} --measure"
        console.print(f"? is not in the index; to measure it: {command}", style="dim", markup=False, soft_wrap=True)
    if report["stages"]:
        stages = table("map", ">channels", ">stride", title="Stages")
        for stage in report["stages"]:
            stages.add_row(stage["module"], str(stage["channels"]), f"{stage['stride']} px")
        console.print(stages)
    if "system" in report:
        _print_family(report)


def _print_family(report: dict[str, Any]) -> None:
    console = out()
    arguments = table("argument", "~value", "~meaning", title="Arguments")
    for row in report["arguments"]:
        style = "bold" if row["set_by"] == "variant" else "dim"
        arguments.add_row(row["name"], f"[{style}]{escaped(row['value'])}[/]", escaped(row["help"]))
    console.print(arguments)
    console.print()
    weights = "\n".join(f"{report['name']}.{tag}  {', '.join(sources)}" for tag, sources in report["weights"].items())
    system = report["system"]
    console.print(
        pairs(
            {
                "variants": ", ".join(report["variants"]),
                "weights": weights or "none known",
                "paper": system["title"],
                "authors' code": system["authors_code"],
            }
        )
    )


def numbers(values: Any) -> str:
    """Join numbers with spaces: (0.485, 0.456) -> "0.485 0.456"."""
    return " ".join(f"{v:g}" for v in values)


def escaped(value: Any) -> str:
    """Return a value as text without rich's markup."""
    from rich.markup import escape

    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))
