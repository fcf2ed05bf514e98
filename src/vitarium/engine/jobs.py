"""Jobs, the messages about them, and what starts them: shared by the runner and its backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

RESULT = "result.json"
"""File of a finished run's result, in its folder."""

Report = Callable[[Any], None]
"""Sends a picklable value to the process that called `run_all`."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: unique among the jobs; names the run in events and errors.
        function: a function of a module, called as function(folder, report, **settings). It returns the result as JSON values, or None
            in a helper process of data-parallel training, which has nothing to write.
        folder: of this run alone; on a cluster it must be on a disk that all machines share.
        settings: picklable keyword arguments: everything that decides the result.
        files: names of files in the folder without which a result does not count as finished.
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
    """Starts runs somewhere."""

    def has_room(self, running: int) -> bool:
        """Return whether another run may start."""

    def start(self, position: int, job: Job) -> None:
        """Start a run, or queue it; a message "started" follows when it has really begun."""

    def messages(self) -> Iterator[Message]:
        """Wait a moment, and yield what came."""

    def close(self, *, cancel: bool) -> None:
        """Release everything; `cancel` interrupts runs that are still under way, so that they save and leave."""
