"""Describe the machine that numbers were measured on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from vitarium.cores import core_count
from vitarium.version import __version__

BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Fields of a core in /proc/stat: user, nice, system, interrupts of both kinds, and what a hypervisor took."""


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, threads, accelerator, system and versions, as plain values."""
    import timm
    import torch

    return {
        "processor": _processor(),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vitarium": __version__,
    }


def describe_device(accelerator: str = "auto") -> str:
    """Return the name of what models run on here: the accelerator, or the processor where there is none or "cpu" was asked for."""
    return (None if accelerator == "cpu" else _accelerator()) or _processor()


class OtherPrograms:
    """Clock of the processor time that other programs use, on the cores of this process.

    A load average would count this process too, with the workers that read its images, and the minute before.
    """

    def __init__(self) -> None:
        self.begin = self._read()

    def share(self) -> float:
        """Return the time of other programs since the clock was made, over that of the cores: 0 to 1; 0 where the system does not count it
        (other than Linux)."""
        (busy, own, wall), now = self.begin, self._read()
        if busy is None or now[0] is None:
            return 0.0
        return round(min(1.0, max(0.0, (now[0] - busy) - (now[1] - own)) / max(1e-9, (now[2] - wall) * core_count())), 2)

    @staticmethod
    def _read() -> tuple[float | None, float, float]:
        """Return the seconds in which the cores were busy, the processor time of this process, and the wall time."""
        try:
            lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
            rows = {row[0]: row[1:] for row in map(str.split, lines) if row}
            ticks = sum(int(rows[f"cpu{core}"][place]) for core in os.sched_getaffinity(0) for place in BUSY_FIELDS)
            busy: float | None = ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, LookupError, ValueError, AttributeError):
            busy = None
        return busy, time.process_time(), time.perf_counter()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "Apple GPU" if torch.backends.mps.is_available() else None


def _processor() -> str:
    """Return the processor's name; Linux keeps it in /proc, where Python does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()
