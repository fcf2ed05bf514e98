"""`vitarium info`: everything about one model, by name or from a saved file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from vitarium.cli.completion import complete_weights
from vitarium.cli.console import out, pairs, print_json, print_tables, table

if TYPE_CHECKING:
    from vitarium.verbs.info import Info


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
    from vitarium.verbs.info import info as run

    found = run(model, image_size=image_size, measure=measure)
    if as_json:
        print_json(found.to_dict())
    elif found.is_file:
        print_file(found)
    else:
        print_model(found)


def print_file(found: Info) -> None:
    """Print the contents of a file as tables."""
    console, record = out(), found.report["model"]
    source = "weights without a record" if record is None else f"saved by vitarium {escape(str(record['vitarium']))}"
    console.print(f"[bold]{escape(str(found.report['file']))}[/]  [dim]{source}[/]\n")
    console.print(pairs(found.facts()))
    print_tables(found.tables())


def print_model(found: Info) -> None:
    """Print a model as tables; the arguments that its variant sets are bold."""
    from vitarium.verbs.info import family_facts, model_facts, value_text

    console, report = out(), found.report
    console.print(f"[bold]{report['name']}[/]  [dim]{report.get('system', {}).get('room', '')}[/]")
    console.print(report["summary"], markup=False)
    console.print()
    console.print(pairs(model_facts(report, found.unknown)))
    if found.unknown:
        command = f"vitarium info {report['name']} --image-size {report['image_size']} --measure"
        console.print(f"? is not in the index; to measure it: {command}", style="dim", markup=False, soft_wrap=True)
    print_tables(data for data in found.tables() if data.title == "Stages")
    if "system" not in report:
        return
    arguments = table("argument", "~value", "~meaning", title="Arguments")
    for row in report["arguments"]:
        style = "bold" if row["set_by"] == "variant" else "dim"
        arguments.add_row(row["name"], f"[{style}]{escape(value_text(row['value']))}[/]", escape(row["help"]))
    console.print(arguments)
    console.print()
    console.print(pairs(family_facts(report)))
