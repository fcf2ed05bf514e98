"""Measurement of costs that the index does not hold, on a model without weights."""

from __future__ import annotations

from collections.abc import Sequence

from vitarium.catalog.filters import Condition
from vitarium.catalog.index import Cost
from vitarium.catalog.search import holds
from vitarium.cli.opening import describe_model
from vitarium.errors import InputError


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
