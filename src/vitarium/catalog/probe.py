"""Cost of one pass of a model, and memory of its weights.

Methods report their costs with these functions, which change neither the model, nor its mode, nor the random state. For the inputs of a
pass see `vitarium.catalog.calling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vitarium.catalog.calling import call
from vitarium.nn import evaluating, frozen_parameters
from vitarium.ops.flops import flop_counter


def macs_of(model: nn.Module, *inputs: Any) -> int:
    """Return the multiply-accumulates of one pass in evaluation mode, counted by torch on the operations that run. Works on the meta
    device.

    Args:
        model: any module.
        inputs: its positional arguments, or one mapping of inputs by name (see `example_inputs`).
    """
    with frozen_parameters(model), evaluating(model), flop_counter() as counter:
        call(model, inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Mapping) else inputs)
    return counter.get_total_flops() // 2


def bytes_of(model: nn.Module) -> int:
    """Return the bytes that the model's parameters and buffers take in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
