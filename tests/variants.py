"""Which variants of a family a test of all variants runs on."""

from __future__ import annotations

import os
from collections.abc import Sequence


def some_of(names: Sequence[str]) -> list[str]:
    """Return the first and the last variant of a family; all of them under `make test-all` (EVERY_VARIANT=1)."""
    return list(names) if os.environ.get("EVERY_VARIANT") else list(dict.fromkeys([names[0], names[-1]]))
