"""`vitarium systems`: the 103, and how far each has come."""

from __future__ import annotations

from vitarium.errors import UsageError, nearest


def check_room(room: str | None) -> None:
    """Refuse a room that no system lives in.

    Raises:
        UsageError: with near names.
    """
    from vitarium.catalog import systems

    rooms = sorted({part for s in systems() for part in (s.room, s.room.split("/")[0])})
    if room is not None and room not in rooms:
        raise UsageError(f"unknown room {room!r}{nearest(room, rooms)} (rooms: {', '.join(rooms)})")
