"""`vitarium systems`: the 103, and how far each has come."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.console import out, print_json, table
from vitarium.errors import UsageError, nearest

if TYPE_CHECKING:
    from vitarium.catalog.evidence import Evidence


class Word(StrEnum):
    """How far a system has come."""

    WORKING = "working"
    PARTIAL = "partial"
    MISSING = "missing"


STYLES = {Word.WORKING: "green", Word.PARTIAL: "yellow", Word.MISSING: "dim"}


def systems(
    room: Annotated[str | None, typer.Option(help="Only this room, such as 'efficiency' or 'efficiency/tokens'.")] = None,
    status: Annotated[Word | None, typer.Option(help="Only systems of this status.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the 103 systems with their status, computed from what is there: models, golden vectors, identities, claims."""
    from vitarium.catalog.evidence import system_statuses

    check_room(room)
    found = [s for s in system_statuses() if in_room(s.room, room) and status in (None, s.status)]
    if as_json:
        return print_json([s.to_dict() for s in found])
    rows = table("system", "room", "status", "~evidence", "title")
    rows.expand, rows.columns[-1].ratio, rows.columns[-1].overflow = True, 1, "ellipsis"  # a long title gives way
    for s in sorted(found, key=lambda s: (s.room, list(Word).index(Word(s.status)), s.slug)):
        rows.add_row(s.slug, s.room, f"[{STYLES[Word(s.status)]}]{s.status}[/]", told(s.evidence), s.title)
    console = out()
    if found:
        console.print(rows)
    counts = Counter(s.status for s in found)
    parts = [f"[{STYLES[word]}]{counts[word.value]} {word}[/]" for word in Word]
    console.print(f"\n{len(found)} systems: {', '.join(parts)}")


def told(evidence: Evidence) -> str:
    """What there is, in a few words; "" for nothing."""
    parts = [counted(len(evidence.models), "model"), counted(len(evidence.methods), "method")]
    parts.append(counted(len(evidence.objectives), "objective"))
    if evidence.goldens_wired:
        parts.append(f"{evidence.goldens_passed}/{evidence.goldens_wired} goldens")
    parts += [counted(evidence.identities, "identity", "identities"), f"claim {evidence.claim}" if evidence.claim else ""]
    return ", ".join(filter(None, parts))


def counted(count: int, one: str, many: str = "") -> str:
    """ "1 model", "2 models", and "" for none."""
    return f"{count} {one if count == 1 else many or one + 's'}" if count else ""


def in_room(room: str, wanted: str | None) -> bool:
    """Whether a room is the wanted one or lies in it; any is, if none is wanted."""
    return wanted is None or room == wanted or room.startswith(f"{wanted}/")


def check_room(room: str | None) -> None:
    """Refuse a room that no system lives in.

    Raises:
        UsageError: with near names.
    """
    from vitarium.catalog import systems

    rooms = sorted({part for s in systems() for part in (s.room, s.room.split("/")[0])})
    if room is not None and room not in rooms:
        raise UsageError(f"unknown room {room!r}{nearest(room, rooms)} (rooms: {', '.join(rooms)})")
