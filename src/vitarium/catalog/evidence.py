"""Status of each of the 103 systems, computed from evidence: registered names, golden vectors, identities, and the claim's verdict.

`pytest --record-evidence` writes test results into `recorded/<slug>.json` beside this file, and claims write their verdicts into
`claims/ledger/<slug>.json`; the index has what each system registers. Nothing is imported or run here.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Literal

from vitarium.catalog.index import entry_of
from vitarium.catalog.systems import find_system, systems

Word = Literal["working", "partial", "missing"]


@dataclass(frozen=True)
class Evidence:
    """Evidence for a system."""

    models: list[str]
    """Names of its models."""
    goldens_passed: int
    goldens_wired: int
    """Number of golden vectors of the original implementation in tests/golden."""
    identities: int
    """Number of passed tests of exact identities."""
    claim: str | None
    """Verdict on the paper's main claim: "held", "not held" or "inconclusive"; None if it was not run."""
    methods: list[str] = field(default_factory=list)
    """Slugs of the methods that it registers."""
    objectives: list[str] = field(default_factory=list)
    """Names of the learners that it registers."""


@dataclass(frozen=True)
class Status:
    """A system with its status."""

    slug: str
    title: str
    room: str
    status: Word
    evidence: Evidence

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def system_status(slug: str) -> Status:
    """Return the status of one system: "missing" (no module), "working", or else "partial".

    A system is working when all its golden vectors pass, at least one exact identity is tested, and its claim has been run, whatever the
    verdict.

    Raises:
        UsageError: unknown slug, or the index lacks the system.
    """
    system, entry = find_system(slug), entry_of(slug)
    row = recorded().get(slug, {})
    goldens = row.get("goldens", {})
    evidence = Evidence(
        models=entry.models() if entry else [],
        methods=sorted(entry.methods) if entry else [],
        objectives=sorted(entry.learners) if entry else [],
        goldens_passed=sum(error is not None for error in goldens.values()),
        goldens_wired=len(goldens),
        identities=sum(row.get("identities", {}).values()),
        claim=_verdict(slug),
    )
    proven = evidence.goldens_passed == evidence.goldens_wired and evidence.identities > 0 and evidence.claim is not None
    word: Word = "missing" if entry is None else "working" if proven else "partial"
    return Status(system.slug, system.title, system.room, word, evidence)


def system_statuses() -> list[Status]:
    """Return the status of all 103 systems, in the order of systems.toml."""
    return [system_status(system.slug) for system in systems()]


@functools.cache
def recorded() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the recorded test results: slug -> "goldens" (name -> error relative to the output's standard deviation, None: failed) and
    "identities" (test -> whether it passed)."""
    folder = resources.files("vitarium.catalog").joinpath("recorded")
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    return {file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8")) for file in files if file.name.endswith(".json")}


def _verdict(slug: str) -> str | None:
    file = resources.files("vitarium").joinpath("claims", "ledger", f"{slug}.json")
    return json.loads(file.read_text(encoding="utf-8")).get("verdict") if file.is_file() else None
