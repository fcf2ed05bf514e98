"""Describe the machine that numbers were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from vitarium.version import __version__


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, threads, accelerator, system and versions, as plain values."""
    import timm
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
