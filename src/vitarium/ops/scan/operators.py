"""Selective scan as a PyTorch operator, `vitarium::selective_scan`, for compilers, autograd and flop counters.

Registering an operator imports the compiler (`torch._dynamo`), which takes about a second. `dispatch` therefore imports this module
only when a call needs the operator: under a compiler, for gradients, or inside a dispatch mode such as a flop counter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitarium.ops.scan.implementations import backward, choose, forward

choose_once = torch.compiler.assume_constant_result(choose)
"""`choose`, evaluated during tracing, so that its result is a constant of the graph."""

scan = torch.library.custom_op("vitarium::selective_scan", forward, mutates_args=())
scan_backward = torch.library.custom_op("vitarium::selective_scan_backward", backward, mutates_args=())


@scan.register_fake
def _shapes(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, softplus: bool, reverse: bool, every: int, implementation: str) -> tuple[Tensor, Tensor]:  # fmt: skip # noqa: E501
    return torch.empty_like(x, memory_format=torch.contiguous_format), a.new_empty(
        x.shape[0], -(-x.shape[1] // every), a.shape[1], a.shape[0]
    )


@scan_backward.register_fake
def _shapes_backward(grad: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip # noqa: E501
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, delta, a, b, c, skip, bias))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*scan_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None)


scan.register_autograd(_gradients, setup_context=_remember)


@register_flop_formula(torch.ops.vitarium.selective_scan)
def _flops(x: tuple[int, ...], delta: Any, a: tuple[int, ...], *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Count 9 operations per state and 1 per channel for each token, as VMamba's authors do."""
    return math.prod(x) * (9 * a[1] + 1)


@register_flop_formula(torch.ops.vitarium.selective_scan_backward)
def _flops_backward(
    grad: Any, x: tuple[int, ...], delta: Any, a: tuple[int, ...], *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    """Count the states once more, and about twice as much for the adjoint."""
    return 3 * math.prod(x) * (9 * a[1] + 1)
