"""FLOP counting that includes this library's own operators."""

from __future__ import annotations

import importlib
import sys

from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """Return a counter of floating-point operations, to be used as a context manager; it prints nothing.

    A counter copies the table of formulas when it is made. The scan registers its operator and formula at first use, so they are registered
    here where a loaded module may call it.
    """
    if "vitarium.ops.scan.dispatch" in sys.modules:
        importlib.import_module("vitarium.ops.scan.operators")
    return FlopCounterMode(display=False)
