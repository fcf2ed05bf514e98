"""Functions that the tests send to other processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitarium.errors import UsageError


def count(folder: Path) -> int:
    """Count the attempts in a folder; return the number of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "attempts"
    attempts = 1 + int(file.read_text() if file.exists() else 0)
    file.write_text(str(attempts))
    return attempts


def run(folder: Path, report: Callable[[Any], None], *, value: int, fails: int = 0, how: str = "raise") -> dict[str, Any]:
    """Fail so many times, then return a result."""
    attempt = count(folder)
    report(f"attempt {attempt}")
    if attempt <= fails:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UsageError("never right") if how == "usage" else RuntimeError(f"attempt {attempt} failed")
    return {"value": value, "pairs": [[value, value + 1]]}


def part(items: Sequence[int], folder: Path | None = None, fails: int = 0) -> list[int]:
    """Return squares; the part that begins with 4 fails so many times first."""
    if folder is not None:
        (folder / f"began-{items[0]}").mkdir(exist_ok=True)
        if items[0] == 4 and count(folder / "part") <= fails:
            raise RuntimeError("this part failed")
    return [item * item for item in items]


def node() -> str:
    """Return the id of this process's node."""
    import ray

    return ray.get_runtime_context().get_node_id()


class Slow:
    """A forward pre-hook: marks the node, waits until as many nodes as expected were marked, and takes its time.

    Args:
        folder: of the marks.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, nodes

    def __call__(self, module: Any, inputs: Any) -> None:
        (self.folder / node()).touch()
        end = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < self.nodes and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.05)
