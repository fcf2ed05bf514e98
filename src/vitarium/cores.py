"""The processor's cores."""

from __future__ import annotations

import os


def core_count() -> int:
    """Return the number of logical cores that this process may use, at least 1; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
