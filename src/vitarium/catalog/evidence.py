"""How far each of the 103 systems has come, computed from what is there: never from a hand-typed word.

`pytest --record-evidence` writes test results into `recorded/<slug>.json` beside this file; the claims write their verdicts into
`claims/ledger/<slug>.json`. Everything else is looked up: whether the module is there, and which models it registers.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Literal

from vitarium.catalog.methods import methods_of_system
from vitarium.catalog.registry import families, system_module
from vitarium.catalog.systems import find_system, systems
from vitarium.training.learners import learners_of_system

Word = Literal["working", "partial", "missing"]


@dataclass(frozen=True)
class Evidence:
    """What speaks for a system."""

    models: list[str]
    """Names that it registers."""
    goldens_passed: int
    goldens_wired: int
    """Vectors of the original implementation that lie in tests/golden."""
    identities: int
    """Passed tests of exact identities."""
    claim: str | None
    """Verdict of the paper's main claim: "held", "not held", "inconclusive", or None where it was not run."""
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
        """For JSON."""
        return asdict(self)


def system_status(slug: str) -> Status:
    """One system's status: "missing" (no module), "working" (all of below), else "partial".

    Working means: every golden vector of the original that the project holds passed, at least one exact identity passed, and its claim was
    run, whichever way it came out.

    Raises:
        UsageError: no system of this slug.
    """
    system = find_system(slug)
    there = system_module(slug) is not None
    row = recorded().get(slug, {})
    goldens = row.get("goldens", {})
    evidence = Evidence(
        models=[name for f in families(slug) for name in f.model_names()] if there else [],
        methods=methods_of_system(slug),
        objectives=learners_of_system(slug),
        goldens_passed=sum(error is not None for error in goldens.values()),
        goldens_wired=len(goldens),
        identities=sum(row.get("identities", {}).values()),
        claim=_verdict(slug),
    )
    proven = evidence.goldens_passed == evidence.goldens_wired and evidence.identities > 0 and evidence.claim is not None
    word: Word = "missing" if not there else "working" if proven else "partial"
    return Status(system.slug, system.title, system.room, word, evidence)


def system_statuses() -> list[Status]:
    """All 103, in the order of systems.toml. Imports only the modules that are there."""
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
