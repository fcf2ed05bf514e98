"""Checking of the classes to generate."""

from __future__ import annotations

import torch
from torch import Tensor

from vitarium.errors import UsageError


def check_labels(labels: Tensor, num_classes: int, *, null: bool = False) -> Tensor:
    """Check class numbers (B,) and return them as int64.

    Args:
        labels: (B,) integers.
        num_classes: of the model.
        null: whether the null class, number num_classes, is accepted.

    Raises:
        UsageError: another shape or dtype, an empty batch, or a class that the model does not have.
    """
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(f"labels are class numbers (B,), got {tuple(labels.shape)} of {labels.dtype}")
    last = num_classes if null else num_classes - 1
    if int(labels.min()) < 0 or int(labels.max()) > last:
        odd = next(v for v in labels.tolist() if not 0 <= v <= last)
        raise UsageError(f"the model has the classes 0 to {num_classes - 1}, got {odd}")
    return labels.long()
