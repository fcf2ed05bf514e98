"""Orders that do not depend on the machine: of equal values the first stays first."""

from __future__ import annotations

import torch
from torch import Tensor


def descending_order(values: Tensor) -> Tensor:
    """(..., n) -> int64 (..., n), the places of the values from the largest to the smallest.

    In an exported graph equal values may come in another order, by what runs the graph: ONNX has no stable sort.
    """
    if torch.compiler.is_exporting():
        return values.argsort(dim=-1, descending=True)
    return values.argsort(dim=-1, descending=True, stable=True)
