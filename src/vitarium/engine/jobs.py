"""Jobs, messages about them, and the interface of backends: shared by the runner and its backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

RESULT = "result.json"
"""File of a finished run's result, in its folder."""

Report = Callable[[Any], None]
"""Function that sends a picklable value to the process that called `run_all`."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: unique among the jobs; names the run in events and errors.
        function: a function of a module, called as function(folder, report, **settings). It returns the result as JSON values, or None in a
            further process of data-parallel training, which writes nothing.
        folder: of this run only; on a cluster it must be on a disk that all machines share.
        settings: picklable keyword arguments that determine the result.
        files: names of files in the folder that a finished result must have.
    """

    name: str
    function: Callable[..., dict[str, Any] | None]
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """Message of a backend about the run at `position`; `kind` is "started", "progress", "done" or "failed"."""

    kind: str
    position: int
    value: Any = None
    traceback: str = ""


class Backend(Protocol):
    """Interface of backends, which start runs."""

    def has_room(self, running: int) -> bool:
        """Return whether another run may start."""

    def start(self, position: int, job: Job) -> None:
        """Start a run, or queue it; a message "started" follows when it begins."""

    def messages(self) -> Iterator[Message]:
        """Wait briefly, and yield new messages."""

    def close(self, *, cancel: bool) -> None:
        """Release all resources; `cancel` interrupts unfinished runs, so that they save and end."""
