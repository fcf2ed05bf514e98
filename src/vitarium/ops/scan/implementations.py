"""Implementations of the selective scan, and the choice among them.

| implementation | where | what it is |
|---|---|---|
| "numba" | CPU, with the extra `fast` | loops compiled at run time (cpu.py) |
| "triton" | CUDA and other devices that Triton supports | one program per block of channels (gpu.py) |
| "loop" | anywhere | the time-major loop in tensor operators (reference.py) |
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.errors import UsageError, nearest, require
from vitarium.ops.precision import without_autocast
from vitarium.ops.scan.reference import loop_backward, loop_forward

IMPLEMENTATIONS = ("auto", "loop", "numba", "triton")


def choose(device: str, implementation: str = "auto") -> str:
    """Return the implementation for a device type.

    Raises:
        UsageError: unknown implementation.
        MissingExtra: the requested implementation is not installed.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(
            f"unknown scan {implementation!r}{nearest(implementation, IMPLEMENTATIONS)} (accepted: {', '.join(IMPLEMENTATIONS)})"
        )
    if implementation == "auto":
        wanted = {"cpu": "numba", "cuda": "triton", "xpu": "triton"}.get(device, "loop")
        return wanted if wanted == "loop" or kernels(wanted) is not None else "loop"
    if implementation != "loop" and kernels(implementation) is None:
        require(implementation, "fast")
    return implementation


@functools.cache
def kernels(name: str) -> ModuleType | None:
    """Return the module of compiled kernels, or None if its compiler is not installed or does not support this Python."""
    try:
        if name == "numba":
            from vitarium.ops.scan import cpu

            return cpu
        from vitarium.ops.scan import gpu

        return gpu
    except ImportError:
        return None


def forward(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor,
    softplus: bool, reverse: bool, every: int, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y, (I, L, D), and the state after each `every` tokens, (I, ceil(L / every), N, D)."""
    if not x.numel():
        return torch.empty_like(x), _no_states(x, a, every)
    with without_autocast(x):
        fast = None if implementation == "loop" else kernels(implementation)
        if fast is not None:
            return fast.forward(x, delta, a, b, c, skip, bias, softplus, reverse, every)
        _, inputs = _loop_inputs(x, delta, b, c, bias, softplus, reverse)
        y, states = loop_forward(inputs[0], inputs[1], a, inputs[2], inputs[3], every)
        return (y.flip(1) if reverse else y).addcmul_(x, skip), states


def backward(
    grad: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, states: Tensor,
    softplus: bool, reverse: bool, every: int, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients to x, delta, a, b, c, skip and bias."""
    if not x.numel():
        zeros = [torch.zeros_like(v) for v in (x, delta, a, b, c, skip, bias)]
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], zeros[5], zeros[6]
    with without_autocast(x):
        fast = None if implementation == "loop" else kernels(implementation)
        if fast is not None:
            return fast.backward(grad, x, delta, a, b, c, skip, bias, states, softplus, reverse, every)
        step, inputs = _loop_inputs(x, delta, b, c, bias, softplus, reverse)
        flipped = grad.flip(1) if reverse else grad
        found = loop_backward(flipped, inputs[0], inputs[1], a, inputs[2], inputs[3], states, every)
        grad_x, grad_delta, grad_b, grad_c = (v.flip(1) if reverse else v for v in (found[0], found[1], found[3], found[4]))
        if softplus:
            grad_delta = grad_delta * torch.sigmoid(step)
        grad_skip = (grad * x).sum((0, 1))
        return grad_x.addcmul(grad, skip), grad_delta.contiguous(), found[2], grad_b, grad_c, grad_skip, grad_delta.sum((0, 1))


def _loop_inputs(
    x: Tensor, delta: Tensor, b: Tensor, c: Tensor, bias: Tensor, softplus: bool, reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the step sizes before the softplus, and the loop's inputs in the order of its run."""
    step = delta + bias
    inputs = [x, F.softplus(step) if softplus else step, b, c]
    return step, [v.flip(1) for v in inputs] if reverse else inputs


def _no_states(x: Tensor, a: Tensor, every: int) -> Tensor:
    return a.new_zeros(x.shape[0], -(-x.shape[1] // every), a.shape[1], a.shape[0])
