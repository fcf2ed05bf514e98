"""Registry of tasks by name. A file is imported only when its task is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vitarium.assignments import parse_call
from vitarium.catalog.index import import_home, known_names
from vitarium.errors import UsageError, nearest
from vitarium.training.settings import check
from vitarium.training.tasks.base import Task

TaskClass = TypeVar("TaskClass", bound=type[Task])

ALIASES: dict[str, dict[str, Any]] = {
    "class": {"name": "classify"},
    "classification": {"name": "classify"},
    "panoptic": {"name": "segment", "kind": "panoptic"},
    "semantic": {"name": "segment", "kind": "semantic"},
    "instance": {"name": "segment", "kind": "instance"},
    "pairs": {"name": "restore"},
    "restoration": {"name": "restore"},
    "retrieval": {"name": "retrieve"},
    "features": {"name": "encode"},
}
"""Accepted aliases, such as names in earlier versions."""

_TASKS: dict[str, type[Task]] = {}


def task(name: str) -> Callable[[TaskClass], TaskClass]:
    """Register a task under a name."""

    def register(cls: TaskClass) -> TaskClass:
        cls.name = name
        _TASKS[name] = cls
        return cls

    return register


def find_task(name: str) -> type[Task]:
    """Return the class of a task. Imports only its file.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    name = ALIASES.get(name, {}).get("name", name)
    if name not in _TASKS:
        import_home("tasks", name)
    if name not in _TASKS:
        known = list_tasks()
        raise UsageError(f"unknown task {name!r}{nearest(name, [*known, *ALIASES])} (tasks: {', '.join(known)})")
    return _TASKS[name]


def parse_task(text: str | dict[str, Any]) -> Task:
    """Create a task from text ("segment:kind=semantic"), from an alias ("semantic"), or from the record of a saved file.

    Raises:
        UsageError: no such task or option.
    """
    if isinstance(text, str):
        name, given = parse_call(text)
    else:
        given = dict(text)
        name = str(given.pop("name", ""))
    cls = find_task(name)
    extra = {key: value for key, value in ALIASES.get(name, {}).items() if key != "name"}
    return check(cls, {**extra, **given}, f"options of the task {cls.name}")


def list_tasks() -> list[str]:
    """Return the names of all tasks. Imports none of them."""
    return known_names("tasks", _TASKS)
