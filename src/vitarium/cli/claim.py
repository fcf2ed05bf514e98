"""`vitarium claim`: test a paper's main claim in a small experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from vitarium.cli.completion import complete_claim
from vitarium.cli.console import err, out, pairs, print_json, print_tables, table
from vitarium.cli.options import Address, EngineKind, Jobs

if TYPE_CHECKING:
    from vitarium.claims import Entry
    from vitarium.verbs.claim import Claims

STYLES = {"held": "green", "not held": "red", "inconclusive": "yellow"}


def claim(
    slugs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SLUG", help="The systems. Without any the ledger is shown.", autocompletion=complete_claim),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all claims.")] = False,
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder of the ledger.", show_default="the package's own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run the experiments of systems' main claims and write the outcomes into the ledger, confirmed or refuted."""
    from vitarium.verbs.claim import claim as run

    found = run(slugs, every=every, engine=engine, address=address, jobs=jobs, out=out_folder, notify=say)
    if as_json:
        print_json([entry.to_dict() for entry in found.entries])
    elif slugs and len(set(slugs)) == 1:
        show(found)
    else:
        summary(found)


def say(line: str) -> None:
    """Print a line of progress."""
    err().print(line, style="dim", markup=False)


def show(found: Claims) -> None:
    """Print one claim with its numbers."""
    from vitarium.verbs.claim import arm_table, gain_of, verdict_of

    entry, console = found.entries[0], out()
    console.print(f"[bold]{entry.slug}[/]: {styled(entry.word)}")
    about = [entry.method, *([f"Task: {entry.task}"] if entry.task else []), *([f"Weights: {entry.weights}"] if entry.weights else [])]
    console.print(f"{escape(entry.says)}\n[dim]{escape(chr(10).join(about))}[/]", highlight=False)
    print_tables([arm_table(entry)])
    console.print()
    console.print(pairs({c["says"]: Text.from_markup(f"{gain_of(c)}  {styled(verdict_of(c))}") for c in entry.comparisons}))
    console.print(f"\n{entry.seconds:.0f} s, {entry.date}, {entry.commit or 'no commit'}", style="dim")


def styled(verdict: str) -> str:
    """Return a verdict in its colour."""
    return f"[{STYLES[verdict.partition(':')[0].removesuffix(' *')]}]{escape(verdict)}[/]"


def summary(found: Claims) -> None:
    """Print the ledger, or the claims that were run, a line per claim; and the claims that are not in the ledger yet."""
    from vitarium.claims.ledger import LEGEND, MARK, counts_of

    rows = table("system", "verdict", "~claim", ">time")
    entries: list[Entry] = found.entries
    for e in entries:
        rows.add_row(e.slug, styled(e.short_word), escape(e.says), f"{e.seconds:.0f} s")
    console = out()
    if entries:
        console.print(rows)
    counts = f": {counts_of(entries)}" if entries else ""
    console.print(f"\n{len(entries)} claims{counts}" + (f"; not run yet: {', '.join(found.missing)}" if found.missing else ""))
    if not all(e.calibrated for e in entries):
        console.print(f"{MARK} {LEGEND}", style="dim", markup=False)
