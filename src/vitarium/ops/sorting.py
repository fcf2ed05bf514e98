"""Sorting that gives the same order on every device: equal values keep their order."""

from __future__ import annotations

import torch
from torch import Tensor


def descending_order(values: Tensor) -> Tensor:
    """Return the indices that sort values in descending order: (..., n) -> int64 (..., n).

    In an exported graph the order of equal values depends on the runtime, because ONNX has no stable sort.
    """
    if torch.compiler.is_exporting():
        return values.argsort(dim=-1, descending=True)
    return values.argsort(dim=-1, descending=True, stable=True)
