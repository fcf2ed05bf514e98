"""Search the index: models by name, room and cost, without importing torch."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Sequence
from typing import Any

from vitarium.catalog.filters import Condition, parse
from vitarium.catalog.index import Cost, lacking, read_index, room_of
from vitarium.catalog.systems import systems
from vitarium.errors import UsageError, nearest


def list_models(pattern: str = "*", *, room: str | None = None, fits: str | Sequence[str] = (), image_size: int | None = None) -> list[str]:
    """Return the names of the library's models, family by family, in the order of their variants.

    Reads the index and imports no model. Families that the running program registered itself (`catalog.family`) are listed too, unless
    a room or a cost is asked for.

    Args:
        pattern: shell pattern, such as "*_pico".
        room: only models of this room, such as "backbones".
        fits: conditions on the cost, such as "params<30M" or ["gmacs<2", "mb<100"]. A model whose cost is unknown does not fit.
        image_size: side of the image for the MACs, pixels; None: each model's own.

    Raises:
        UsageError: unknown room, or a condition that cannot be read.
    """
    conditions = [parse(text) for text in ([fits] if isinstance(fits, str) else fits)]
    check_room(room)
    models = read_index().models
    names = [
        name
        for name, (family, variant) in models.items()
        if fnmatch.fnmatch(name, pattern)
        and in_room(room_of(family.slug, family.module), room)
        and (not conditions or _fits(variant, conditions, image_size))
    ]
    if room is None and not conditions:
        names += [name for name in _registered_here() if name not in models and fnmatch.fnmatch(name, pattern)]
    return names


def _fits(variant: Any, conditions: Sequence[Condition], image_size: int | None) -> bool:
    try:
        return holds(variant.cost(image_size), conditions)
    except UsageError:  # it cannot be built for this size
        return False


def _registered_here() -> list[str]:
    registry = sys.modules.get("vitarium.catalog.registry")
    return [name for family in registry.registered_families() for name in family.model_names()] if registry else []


def unknown_model(name: str) -> UsageError:
    """Return the error for an unknown model name, with similar names."""
    hint = lacking(name) or nearest(name, list_models())
    return UsageError(f"unknown model {name!r}{hint} ('vitarium models' lists all; 'timm/NAME' and 'hf/OWNER/NAME' reach others)")


def find_models(pattern: str, room: str | None = None, *, timm: bool = False) -> list[dict[str, Any]]:
    """Return name, family, room, learner and frames of the matching models: the library's own, then small ones of other libraries.

    Args:
        pattern: shell pattern, or a part of the name.
        room: only models of this room.
        timm: for a pattern that begins with "timm/", search all of timm's models too; this imports timm.

    Raises:
        UsageError: unknown room.
    """
    check_room(room)
    wanted, index = matcher(pattern), read_index()
    rows: list[dict[str, Any]] = [
        {"name": v.name, "family": f.name, "room": room_of(f.slug, f.module), "learner": f.learner, "frames": v.frames}
        for f in index.families()
        for v in f.variants.values()
    ]
    rows += [foreign_row(name) for name in index.foreign]
    if timm and pattern.startswith("timm/"):
        from timm import list_models as list_timm

        rows += [foreign_row(name) for bare in list_timm() if (name := f"timm/{bare}") not in index.foreign]
    return [row for row in rows if wanted.match(row["name"]) and in_room(row["room"], room)]


def foreign_row(name: str) -> dict[str, Any]:
    """Return the row of a model of another library, such as "timm/resnet18"."""
    return {"name": name, "family": name.split("/")[0], "room": "backbones", "learner": "classification", "frames": None}


def cost_of(name: str, image_size: int | None = None) -> Cost | None:
    """Return the cost of a model, or None for one that the index does not hold.

    Raises:
        UsageError: the model cannot be built for this size.
    """
    index = read_index()
    variant = index.models[name][1] if name in index.models else index.foreign.get(name)
    return variant.cost(image_size) if variant else None


def holds(cost: Cost, conditions: Sequence[Condition]) -> bool:
    """Return whether a cost satisfies all conditions."""
    return all(c.holds(getattr(cost, "bytes" if c.quantity == "mb" else c.quantity)) for c in conditions)


def matcher(pattern: str) -> re.Pattern[str]:
    """Compile a shell pattern; a word without wildcards matches anywhere in a name."""
    return re.compile(fnmatch.translate(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"), re.IGNORECASE)


def in_room(room: str, wanted: str | None) -> bool:
    """Return whether a room is `wanted` or inside it; always true for None."""
    return wanted is None or room == wanted or room.startswith(f"{wanted}/")


def check_room(room: str | None) -> None:
    """Raise UsageError, with similar names, for a room that holds no system."""
    rooms = sorted({part for s in systems() for part in (s.room, s.room.split("/")[0])})
    if room is not None and room not in rooms:
        raise UsageError(f"unknown room {room!r}{nearest(room, rooms)} (rooms: {', '.join(rooms)})")
