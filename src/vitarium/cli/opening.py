"""A model without weights for commands that only describe it, and name patterns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def describe_model(name: str, **options: Any) -> nn.Module:
    """Create a model on the meta device, for its shapes and its cost."""
    import torch

    import vitarium

    with torch.device("meta"), quiet():
        return vitarium.create_model(name, **options)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of other libraries."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
