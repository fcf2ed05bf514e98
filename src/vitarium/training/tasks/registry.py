"""Registry of tasks by name. A file is imported only when its task is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vitarium.assignments import parse_call
from vitarium.catalog.classes import Classes
from vitarium.catalog.record import TASK_ALIASES as ALIASES
from vitarium.training.settings import check
from vitarium.training.tasks.base import Task

TaskClass = TypeVar("TaskClass", bound=type[Task])

TASKS: Classes[Task] = Classes("tasks", "task")


def task(name: str) -> Callable[[TaskClass], TaskClass]:
    """Register a task under a name."""
    return TASKS.register(name, lambda cls: setattr(cls, "name", name))


def find_task(name: str) -> type[Task]:
    """Return the class of a task. Imports only its file.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    return TASKS.find(ALIASES.get(name, {}).get("name", name), ALIASES)


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
    return TASKS.names()
