"""Full precision for parts of a model under autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> Any:
    """Return a context that disables autocast on x's device. (The meta device, on which models are measured, has no autocast.)"""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
