"""`vitarium claim`: does a paper's main claim hold in a small honest experiment?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.console import err, out, pairs, print_json, table
from vitarium.errors import UsageError

if TYPE_CHECKING:
    from vitarium.claims import Entry

STYLES = {"held": "green", "not held": "red", "inconclusive": "yellow"}
CACHE = Path("runs", "claims")  # a claim that is interrupted goes on here


def claim(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG", help="The systems. Without any the ledger is shown.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all claims.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Claims at a time, each in a process with its share of the cores.")] = 1,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder of the ledger.", show_default="the package's own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run the experiments of systems' main claims and write what came out into the ledger, whichever way it came out."""
    from vitarium.claims import claimed_slugs, read_ledger, run_claims

    if slugs and every:
        raise UsageError(f"give systems or --all, not both: vitarium claim {' '.join(slugs)}")
    wanted = list(dict.fromkeys(slugs or [])) or (claimed_slugs() if every else [])
    entries = run_claims(wanted, out=out_folder, cache=CACHE, jobs=jobs, progress=say) if wanted else read_ledger(out_folder)
    if as_json:
        print_json([entry.to_dict() for entry in entries])
    elif len(wanted) == 1:
        show(entries[0])
    else:
        written = {entry.slug for entry in read_ledger(out_folder)}
        summary(entries, [slug for slug in claimed_slugs() if slug not in written])


def say(line: str) -> None:
    """Progress."""
    err().print(line, style="dim", markup=False)


def show(entry: Entry) -> None:
    """One claim with its numbers."""
    console = out()
    console.print(f"[bold]{entry.slug}[/]: [{STYLES[entry.verdict]}]{entry.verdict}[/]")
    console.print(f"{entry.says}\n[dim]{entry.method}[/]", highlight=False)
    rows = table("arm", "~values", ">mean", title="Measured")
    seen = []
    for comparison in entry.comparisons:
        for arm in filter(None, (comparison["method"], comparison["baseline"])):
            if arm not in seen:
                seen.append(arm)
                rows.add_row(arm["label"], " ".join(f"{v:.4g}" for v in arm["values"]), f"{arm['mean']:.4g} {arm['unit']}")
    console.print(rows)
    console.print()
    console.print(pairs({c["says"]: gained(c) for c in entry.comparisons}))
    console.print(f"\n{entry.seconds:.0f} s, {entry.date}, {entry.commit or 'no commit'}", style="dim")


def gained(comparison: dict[str, Any]) -> str:
    """Gain, its standard error, what was needed, and the verdict of one comparison."""
    verdict = f"[{STYLES[comparison['verdict']]}]{comparison['verdict']}[/]"
    return f"{comparison['gain']:+.3g} ± {comparison['error']:.2g} (needed: {comparison['at_least']:g})  {verdict}"


def summary(entries: list[Entry], missing: list[str]) -> None:
    """The ledger, or what was run, a line a claim; and the claims that stand in no ledger yet."""
    rows = table("system", "verdict", "~claim", ">time", "date")
    for e in entries:
        rows.add_row(e.slug, f"[{STYLES[e.verdict]}]{e.verdict}[/]", e.says, f"{e.seconds:.0f} s", e.date)
    console = out()
    if entries:
        console.print(rows)
    console.print(f"\n{len(entries)} claims" + (f"; not run yet: {', '.join(missing)}" if missing else ""))
