"""`vitarium systems`: list the 103 systems with their status."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.catalog.search import check_room, in_room
from vitarium.cli.completion import complete_room
from vitarium.cli.console import out, print_json, table

if TYPE_CHECKING:
    from vitarium.catalog.evidence import Evidence


class Word(StrEnum):
    """Status of a system."""

    WORKING = "working"
    PARTIAL = "partial"
    MISSING = "missing"


STYLES = {Word.WORKING: "green", Word.PARTIAL: "yellow", Word.MISSING: "dim"}


def systems(
    room: Annotated[
        str | None, typer.Option(help="Only this room, such as 'efficiency' or 'efficiency/tokens'.", autocompletion=complete_room)
    ] = None,
    status: Annotated[Word | None, typer.Option(help="Only systems of this status.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the 103 systems with their status, computed from the models, golden vectors, identities and claims that exist."""
    from vitarium.catalog.evidence import system_statuses

    check_room(room)
    found = [s for s in system_statuses() if in_room(s.room, room) and status in (None, s.status)]
    if as_json:
        return print_json([s.to_dict() for s in found])
    rows = table("system", "room", "status", "~evidence", "title")
    rows.expand, rows.columns[-1].ratio, rows.columns[-1].overflow = True, 1, "ellipsis"  # a long title is shortened
    for s in sorted(found, key=lambda s: (s.room, list(Word).index(Word(s.status)), s.slug)):
        rows.add_row(s.slug, s.room, f"[{STYLES[Word(s.status)]}]{s.status}[/]", summary(s.evidence), s.title)
    console = out()
    if found:
        console.print(rows)
    counts = Counter(s.status for s in found)
    parts = [f"[{STYLES[word]}]{counts[word.value]} {word}[/]" for word in Word]
    console.print(f"\n{len(found)} systems: {', '.join(parts)}")


def summary(evidence: Evidence) -> str:
    """Return a short text of the evidence; "" for none."""
    parts = [counted(len(evidence.models), "model"), counted(len(evidence.methods), "method")]
    parts.append(counted(len(evidence.objectives), "objective"))
    if evidence.goldens_wired:
        parts.append(f"{evidence.goldens_passed}/{evidence.goldens_wired} goldens")
    parts += [counted(evidence.identities, "identity", "identities"), f"claim {evidence.claim}" if evidence.claim else ""]
    return ", ".join(filter(None, parts))


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun: "1 model", "2 models", "" for none."""
    return f"{count} {one if count == 1 else many or one + 's'}" if count else ""
