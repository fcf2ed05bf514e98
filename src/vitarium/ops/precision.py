"""Parts of a model that stay in full precision whatever surrounds them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> Any:
    """A context in which nothing is cast by autocast on x's device. (The meta device, where models are measured, knows no autocast.)"""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
