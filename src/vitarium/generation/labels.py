"""Parsing and checking of the classes to generate."""

from __future__ import annotations

import torch
from torch import Tensor

from vitarium.errors import UsageError, nearest


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


def parse_classes(text: str | None, num_classes: int, names: list[str] | None) -> list[int]:
    """Parse classes such as "3,7", "0-9", "cat,dog"; None: all classes.

    Raises:
        UsageError: a number or a name that the model does not have.
    """
    if text is None:
        return list(range(num_classes))
    found: list[int] = []
    for word in (part.strip() for part in text.split(",") if part.strip()):
        first, dash, last = word.partition("-")
        if names is not None and word in names:
            found.append(names.index(word))
        elif word.isdecimal():
            found.append(int(word))
        elif dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            found.extend(range(int(first), int(last) + 1))
        else:
            known = f"{nearest(word, names)} (classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
            raise UsageError(f"the model has no class {word!r}{known or f'; its classes are the numbers 0 to {num_classes - 1}'}")
    if not found:
        raise UsageError("no class was named; write numbers or names separated by commas, as 0,3-5,cat")
    if wrong := [c for c in found if c >= num_classes]:
        raise UsageError(f"the model has the classes 0 to {num_classes - 1}, got {wrong[0]}")
    return found
