"""The 103 systems: slug, title, room and authors' code of each, read from systems.toml."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from vitarium.errors import UsageError, nearest


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: name of its file, test, claim and docs page.
        title: of the paper.
        room: folder of its module, such as "backbones" or "efficiency/tokens".
        authors_code: repository of the authors ("owner/name"), or "none".
    """

    slug: str
    title: str
    room: str
    authors_code: str


@functools.cache
def systems() -> tuple[System, ...]:
    """Return the 103 systems, in the order of systems.toml."""
    text = resources.files("vitarium.catalog").joinpath("systems.toml").read_text(encoding="utf-8")
    return tuple(System(**row) for row in tomllib.loads(text)["system"])


def find_system(slug: str) -> System:
    """Return the system with this slug.

    Raises:
        UsageError: there is none; the message names similar slugs.
    """
    for system in systems():
        if system.slug == slug:
            return system
    raise UsageError(f"unknown system {slug!r}{nearest(slug, [s.slug for s in systems()])} ('vitarium systems' lists all)")
