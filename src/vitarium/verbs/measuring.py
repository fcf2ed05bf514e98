"""Models without weights, and their costs that the index does not hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vitarium.catalog.filters import Condition
from vitarium.catalog.index import Cost
from vitarium.catalog.search import holds
from vitarium.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def measure_cost(name: str, image_size: int | None = None, *, memory: bool = False, conditions: Sequence[Condition] = ()) -> Cost:
    """Return the cost of a model that is built without weights.

    Args:
        name: as for `create_model`.
        image_size: side of the square input, pixels; None: the model's own.
        memory: whether to measure peak memory too.
        conditions: MACs, which take longest, are not counted for a model that fails another of these.

    Raises:
        UsageError: unknown model, or it cannot be built for this size.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.catalog.calling import example_inputs
    from vitarium.efficiency.profiler import count_macs, count_params, peak_memory, weight_bytes

    model = describe_model(name, **({} if image_size is None else {"image_size": image_size}))
    size = image_size or preprocessing_of(model).image_size
    cost = Cost(size, count_params(model), weight_bytes(model), None, None)
    if not holds(cost, [c for c in conditions if c.quantity != "macs"]):
        return cost
    try:
        macs = count_macs(model, size)
    except (InputError, TypeError):  # unsupported size, a model of clips, or one with further inputs (a time step, a class)
        return cost
    peak = peak_memory(model, example_inputs(model, 1, size)) if memory else None
    return Cost(size, cost.params, cost.bytes, macs, peak)


def stages_of(model: Any) -> list[dict[str, Any]]:
    """Return the feature maps of a model: module, channels, stride in pixels."""
    found = getattr(model, "feature_info", None) or []
    rows = found if isinstance(found, list) else found.info  # timm wraps its list
    return [{"module": r["module"], "channels": r["num_chs"], "stride": r["reduction"]} for r in rows]


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
