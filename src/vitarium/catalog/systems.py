"""The 103 systems: what each is, where it lives, and how far it has come, computed from what is really there."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from vitarium.errors import UsageError, nearest


@dataclass(frozen=True)
class System:
    """A row of systems.toml."""

    slug: str
    title: str
    room: str
    authors_code: str


@functools.cache
def systems() -> tuple[System, ...]:
    """The 103 rows, in the order of the file."""
    text = resources.files("vitarium.catalog").joinpath("systems.toml").read_text(encoding="utf-8")
    return tuple(System(**row) for row in tomllib.loads(text)["system"])


def find_system(slug: str) -> System:
    """The row of a slug.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    for system in systems():
        if system.slug == slug:
            return system
    raise UsageError(f"unknown system {slug!r}{nearest(slug, [s.slug for s in systems()])} ('vitarium systems' lists all)")
