"""Registries of classes by name (methods, learners, tasks, explainers), each imported from its file when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Generic, TypeVar

from vitarium.catalog.index import Registry, lacking, read_index
from vitarium.errors import UsageError, nearest

Class = TypeVar("Class")
Registered = TypeVar("Registered")
_REGISTRIES: dict[Registry, Classes[Any]] = {}
"""The registries that this process uses so far."""


class Classes(Generic[Class]):
    """A registry: the library's classes are listed in the index, others register themselves.

    Args:
        table: of the index.
        word: what its classes are called in messages, such as "method".
    """

    def __init__(self, table: Registry, word: str):
        self.table, self.word = table, word
        self.registered: dict[str, type[Class]] = {}
        _REGISTRIES[table] = self

    def register(self, name: str, prepare: Callable[[Any], None]) -> Callable[[Registered], Registered]:
        """Return a decorator that registers a class under a name, after `prepare` has set its attributes."""

        def register(cls: Registered) -> Registered:
            prepare(cls)
            self.registered[name] = cls  # type: ignore[assignment]
            return cls

        return register

    def find(self, name: str, aliases: Iterable[str] = ()) -> type[Class]:
        """Return the class of a name. Imports only its file.

        Args:
            name: as registered.
            aliases: further names for the suggestion in the message.

        Raises:
            UsageError: unknown name; the message names similar ones.
        """
        if name not in self.registered and (home := read_index().home(self.table, name)) is not None:
            import_module(home)
        if name not in self.registered:
            known = self.names()
            hint = lacking(name) or nearest(name, [*known, *aliases])
            raise UsageError(f"unknown {self.word} {name!r}{hint} ({self.word}s: {', '.join(known)})")
        return self.registered[name]

    def names(self) -> list[str]:
        """Return the names in the index and those that this process registered, sorted. Imports none of them."""
        return sorted({*read_index().names(self.table), *self.registered})


def known_names(table: Registry) -> list[str]:
    """Return the names in a registry, those of the user's own code included. Imports none of them."""
    return _REGISTRIES[table].names() if table in _REGISTRIES else read_index().names(table)
