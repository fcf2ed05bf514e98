"""Run the experiments of the systems' main claims, or read the ledger of their outcomes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import UsageError
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import Notify, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from vitarium.claims import Entry
    from vitarium.engine import Engine

CACHE = Path("runs", "claims")
"""Folder of trained arms, from which an interrupted run resumes."""


@dataclass(repr=False)
class Claims(Result):
    """Outcomes of claims.

    Attributes:
        entries: one per claim, see `vitarium.claims.Entry`: verdict, measured arms, comparisons, seconds, date, machine, commit.
        missing: systems whose claim is not in the ledger yet; listed only if the ledger was read or several claims were run.
    """

    entries: list[Entry]
    missing: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        if len(self.entries) == 1:
            (entry,) = self.entries
            return {entry.slug: entry.word, "claim": entry.says}
        verdicts = [entry.word for entry in self.entries]
        return {"claims": len(verdicts)} | {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}

    def tables(self) -> list[TableData]:
        if len(self.entries) == 1:
            return [arm_table(self.entries[0]), comparison_table(self.entries[0])]
        rows = [[e.slug, e.word, e.says, f"{e.seconds:.0f} s", e.date] for e in self.entries]
        return [TableData("", ["system", "verdict", "~claim", ">time", "date"], rows)]

    def to_dict(self) -> dict[str, Any]:
        return {"entries": [entry.to_dict() for entry in self.entries], "missing": self.missing}


def claim(
    slugs: str | Sequence[str] | None = None,
    *,
    every: bool = False,
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = CACHE,
    notify: Notify = quiet,
) -> Claims:
    """Run the experiments of systems' main claims and write the outcomes into the ledger; without systems, read the ledger.

    The same call resumes an interrupted run.

    Args:
        slugs: systems, one or several; None with `every` unset: read the ledger.
        every: run all claims.
        engine: "local", this machine; "ray", a Ray cluster; or an `engine.Engine`.
        address: of a running Ray cluster, "auto" or "HOST:PORT".
        jobs: claims at a time; None: 1 locally, as many as the cluster allows under Ray.
        out: folder of the ledger; None: the package's own.
        cache: folder of trained arms while claims run; None: an interrupted run is not resumed.
        notify: called with a line for each arm and seed.

    Raises:
        UsageError: unknown systems or systems without a claim (before anything runs), or both `slugs` and `every`.
        DataError: a folder that cannot be written.
        MissingExtra: engine="ray" without Ray.
    """
    from vitarium.claims import claimed_slugs, read_ledger, run_claims
    from vitarium.engine import as_engine

    named = [slugs] if isinstance(slugs, str) else list(slugs or [])
    if named and every:
        raise UsageError(f"give systems or --all, not both: vitarium claim {' '.join(named)}")
    where = as_engine(engine, address=address, jobs=jobs)
    folder = None if out is None else Path(out)
    wanted = list(dict.fromkeys(named)) or (claimed_slugs() if every else [])
    kept = None if cache is None else Path(cache)
    entries = run_claims(wanted, out=folder, cache=kept, engine=where, progress=notify) if wanted else read_ledger(folder)
    if len(wanted) == 1:
        return Claims(entries)
    written = {entry.slug for entry in read_ledger(folder)}
    return Claims(entries, [slug for slug in claimed_slugs() if slug not in written])


def arm_table(entry: Entry) -> TableData:
    """Return the measured values of each arm."""
    table, seen = TableData("Measured", ["arm", "~values", ">mean"]), []
    for comparison in entry.comparisons:
        for arm in filter(None, (comparison["method"], comparison["baseline"])):
            if arm not in seen:
                seen.append(arm)
                table.rows.append([arm["label"], " ".join(f"{v:.4g}" for v in arm["values"]), f"{arm['mean']:.4g} {arm['unit']}"])
    return table


def comparison_table(entry: Entry) -> TableData:
    """Return gain, interval, needed gain and verdict of each comparison."""
    rows = [[c["says"], gain_of(c), verdict_of(c)] for c in entry.comparisons]
    return TableData("Compared", ["~comparison", ">gain", "verdict"], rows)


def gain_of(comparison: dict[str, Any]) -> str:
    """Return gain, 95 % interval and needed gain of a comparison of an entry, as text."""
    if comparison.get("exact"):
        spread = ""
    elif interval := comparison.get("interval"):
        spread = f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    else:
        spread = f" ± {comparison['error']:.2g}" if comparison["error"] else " (one value)"
    margin = comparison.get("margin")
    needed = f"at least {comparison['at_least']:g}" if margin is None else f"within ±{margin:g}"
    return f"{comparison['gain']:+.3g}{spread}, needed {needed}"


def verdict_of(comparison: dict[str, Any]) -> str:
    """Return the verdict of a comparison of an entry; for one that was not calibrated with the reason."""
    from vitarium.claims.ledger import OLD

    reason = comparison.get("uncalibrated", OLD)
    return f"{comparison['verdict']}: not calibrated ({reason})" if reason else str(comparison["verdict"])
