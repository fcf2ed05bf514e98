"""`vitarium info`: all about one model, by name or from a saved file."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.console import out, pairs, print_json, short, table
from vitarium.cli.opening import describe_model
from vitarium.verbs.opening import is_file

if TYPE_CHECKING:
    from torch import nn

    from vitarium.catalog import Family

EVERYWHERE = {"in_chans": "channels of the image.", "num_classes": "classes of the head; 0 for none."}  # told once, not in each docstring


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A model's name, or a file that `vitarium.save` wrote.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image for MACs, pixels.", show_default="the model's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a model: what it is, its arguments, variants, cost, stages, preprocessing and known weights; of a file, what it remembers."""
    if is_file(model):
        from vitarium.cli.info_file import describe_file, print_file

        header = describe_file(model)
        (print_json if as_json else print_file)(header)
    else:
        (print_json if as_json else _print)(describe(model, image_size))


def describe(name: str, image_size: int | None = None) -> dict[str, Any]:
    """Everything that `info` prints, as plain values."""
    from vitarium.catalog import find_model, preprocessing_of

    bare = name if "/" in name else name.partition(".")[0]
    model = describe_model(bare, **({} if image_size is None else {"image_size": image_size}))
    preprocessing = preprocessing_of(model)
    report: dict[str, Any] = {
        "name": bare,
        "summary": first_paragraph(type(model).__doc__),
        **_cost(model, image_size or preprocessing.image_size),
        "num_classes": getattr(model, "num_classes", None),
        "stages": _stages(model),
        "preprocessing": preprocessing.to_dict(),
    }
    return report if "/" in bare else report | _of_family(*find_model(bare))


def _cost(model: nn.Module, size: int) -> dict[str, Any]:
    from vitarium.catalog.calling import example_inputs
    from vitarium.cli.models import macs_of
    from vitarium.efficiency.profiler import count_params, peak_memory, weight_bytes

    macs = macs_of(model, size)
    memory = None if macs is None else peak_memory(model, example_inputs(model, 1, size)) / 1e6
    return {"params": count_params(model), "bytes": weight_bytes(model), "macs": macs, "peak_memory_mb": memory, "image_size": size}


def _stages(model: nn.Module) -> list[dict[str, Any]]:
    """Maps that the model gives out: module, channels, stride in pixels."""
    found = getattr(model, "feature_info", None) or []
    rows = found if isinstance(found, list) else found.info  # timm wraps its list
    return [{"module": r["module"], "channels": r["num_chs"], "stride": r["reduction"]} for r in rows]


def _of_family(family: Family, variant: str) -> dict[str, Any]:
    from vitarium.catalog import find_system

    system = find_system(family.slug)
    told = EVERYWHERE | told_arguments(family.cls.__doc__)
    values = family.arguments(variant)
    arguments = [
        {
            "name": p.name,
            "value": plain(values.get(p.name, None if p.default is p.empty else p.default)),
            "set_by": "variant" if p.name in values else "default",
            "help": told.get(p.name, ""),
        }
        for p in inspect.signature(family.cls).parameters.values()
    ]
    module = inspect.getmodule(family.cls)
    return {
        "summary": first_paragraph(module.__doc__ if module else None),
        "system": {"slug": system.slug, "title": system.title, "room": system.room, "authors_code": system.authors_code},
        "arguments": arguments,
        "variants": family.model_names(),
        "weights": {tag: list(sources) for tag, sources in family.weights.get(variant, {}).items()},
    }


def first_paragraph(doc: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())


def told_arguments(doc: str | None) -> dict[str, str]:
    """What a docstring's "Args:" says of each argument."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc or ""), re.MULTILINE | re.DOTALL)
    told: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + section[1]) if section else []:
        names, colon, text = entry.strip().partition(":")
        if colon:
            told |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return told


def plain(value: Any) -> Any:
    """A value that JSON can hold; a class by its name."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _print(report: dict[str, Any]) -> None:
    console = out()
    console.print(f"[bold]{report['name']}[/]  [dim]{report.get('system', {}).get('room', '')}[/]")
    console.print(report["summary"], markup=False)
    console.print()
    size, pre = report["image_size"], report["preprocessing"]
    rows = {"parameters": f"{short(report['params'])}  ({report['bytes'] / 1e6:.1f} MB)"}
    if report["macs"] is not None:
        rows["MACs"] = f"{short(report['macs'])}  at {size}x{size} pixels"
        rows["memory"] = f"{report['peak_memory_mb']:.1f} MB  at most in one forward pass of one image"
    rows["classes"] = str(report["num_classes"])
    scale = f"mean {numbers(pre['mean'])}, std {numbers(pre['std'])}"
    rows["preprocessing"] = f"{pre['image_size']} px, {pre['interpolation']}, crop {pre['crop_pct']:g}, {scale}"
    console.print(pairs(rows))
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
    """(0.485, 0.456) -> "0.485 0.456"."""
    return " ".join(f"{v:g}" for v in values)


def escaped(value: Any) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape

    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))
