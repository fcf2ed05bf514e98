"""Ledger of claims: the result of each, confirmed or refuted, with its numbers, spread, machine and commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from vitarium.catalog import systems
from vitarium.claims.judging import Verdict
from vitarium.errors import DataError
from vitarium.files import write_json

OLD = "measured before claims named a floor and a ceiling"
MARK = "*"
"""Follows the verdict of a claim that was not calibrated, in a table; below it stands `LEGEND`."""
LEGEND = "not calibrated: measured before claims named a range, or outside of it; `vitarium claim SLUG` shows the reason and measures again"


def counts_of(entries: Sequence[Entry]) -> str:
    """Return the number of entries of each verdict, such as "7 held (5 not calibrated), 1 not held"; "" without entries."""
    texts = []
    for verdict in get_args(Verdict):
        found = [entry for entry in entries if entry.verdict == verdict]
        old = sum(not entry.calibrated for entry in found)
        remark = f" ({'all' if old == len(found) > 1 else old} not calibrated)" if old else ""
        texts += [f"{len(found)} {verdict}{remark}"] if found else []
    return ", ".join(texts)


@dataclass(frozen=True)
class Entry:
    """Result of one claim.

    Attributes:
        comparisons: a dict each: says, method and baseline (label, values, mean, unit), gain, error (standard), interval (95 %, or None
            for a single value), at_least, margin, range (floor and ceiling), exact, uncalibrated (why it says nothing, or ""), verdict.
        seconds: wall time of the run.
        machine: as engine.machine describes it.
        commit: of the code, with "+" if files were changed since; "" outside a checkout.
        task: what was learned, and why it needs the mechanism.
        weights: pretrained weights that were used; "" for none.
    """

    slug: str
    says: str
    method: str
    verdict: Verdict
    comparisons: list[dict[str, Any]]
    seconds: float
    date: str
    machine: dict[str, Any]
    commit: str
    task: str = ""
    weights: str = ""

    @property
    def calibrated(self) -> bool:
        """Return whether every comparison was calibrated; false for entries that were measured before claims had a floor and a ceiling."""
        return all(c.get("uncalibrated", OLD) == "" for c in self.comparisons)

    @property
    def word(self) -> str:
        """The verdict, with the remark that the claim was not calibrated where that is so."""
        return self.verdict if self.calibrated else f"{self.verdict}: not calibrated"

    @property
    def short_word(self) -> str:
        """The verdict, with `MARK` where the claim was not calibrated."""
        return self.verdict if self.calibrated else f"{self.verdict} {MARK}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as a dictionary for JSON."""
        return asdict(self)


def ledger_folder() -> Path:
    """Return the folder of the ledger, inside the package, so that it is installed with it."""
    return Path(str(resources.files("vitarium") / "claims" / "ledger"))


def write_entry(entry: Entry, folder: Path | None = None) -> Path:
    """Write an entry (to the package's ledger, or to `folder`) atomically. Returns the file.

    Raises:
        DataError: the folder cannot be written (an installed package on a read-only disk); pass another one.
    """
    path = (folder or ledger_folder()) / f"{entry.slug}.json"
    try:
        write_json(path, entry.to_dict())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose a folder that can be written with --out") from error
    return path


def read_ledger(folder: Path | None = None) -> list[Entry]:
    """Return all entries, in the order of systems.toml."""
    files = [(folder or ledger_folder()) / f"{system.slug}.json" for system in systems()]
    return [Entry(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.is_file()]
