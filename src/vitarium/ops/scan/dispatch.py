"""Selective scan with the fastest implementation that the device has (implementations.py).

Under autograd and in compiled graphs the scan is one operator, `vitarium::selective_scan`, with its own backward pass and flop formula
(operators.py). Exported graphs run without this library, and function transforms need ordinary operators: these use a parallel prefix.

Memory: linear in tokens and channels; the backward pass keeps one state every K >= 4 N tokens, at most a quarter of an activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.errors import UsageError
from vitarium.ops.linear import in_plain_inference
from vitarium.ops.scan.implementations import choose, forward
from vitarium.ops.scan.reference import scan_doubling


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan along the tokens: s_t = exp(delta_t a) s_{t-1} + delta_t b_t x_t, y_t = <c_t, s_t> + skip x_t, from s = 0 (Mamba).

    Args:
        x: input, (I, L, D): images, tokens, channels.
        delta: step sizes before `bias` and `softplus`, (I, L, D).
        a: (D, N), rate of each state of each channel; negative.
        b, c: (I, L, N), input and output weights of the states at each token.
        skip: (D,), weight of the input itself; None: zero.
        bias: (D,), added to delta.
        softplus: whether log(1 + exp(.)) is applied to delta.
        reverse: whether to run from the last token to the first; equals flipping the tokens of all inputs and of y.
        implementation: one of IMPLEMENTATIONS; "auto" takes the fastest.

    Returns:
        y, (I, L, D) in x's dtype, and the last state, (I, D, N), without gradient. Arithmetic and state are float32 (float64 for float64)
        whatever the inputs' dtype, under autocast too.

    Raises:
        UsageError: shapes that do not fit, or an unknown implementation.
        MissingExtra: the requested implementation is not installed.

    Source: mamba's `selective_scan_ref` and `selective_scan_fn`, with tokens before channels.
    """
    _check(x, delta, a, b, c, skip, bias)
    exact = torch.float64 if x.dtype is torch.float64 else torch.float32
    zeros = torch.zeros(a.shape[0], dtype=exact, device=x.device) if skip is None or bias is None else None
    skip = zeros if skip is None else skip.to(exact)
    bias = zeros if bias is None else bias.to(exact)
    assert skip is not None
    assert bias is not None
    a = a.to(exact)
    if _needs_operators():
        y, state = _with_operators(x.to(exact), delta.to(exact), a, b.to(exact), c.to(exact), skip, bias, softplus, reverse)
        return y.to(x.dtype), state
    run: Any = forward
    pick = choose
    if not in_plain_inference(x, delta, a, b, c, skip, bias):
        from vitarium.ops.scan import operators  # imports the compiler, so only when the registered operator is needed

        run, pick = operators.scan, operators.choose_once
    name = pick(x.device.type, implementation)
    values = (x, delta, b, c) if name == "triton" else tuple(v.to(exact) for v in (x, delta, b, c))
    tensors = (values[0], values[1], a, *values[2:], skip, bias)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    every = _spacing(a.shape[1]) if trained else max(1, x.shape[1])
    y, states = run(*tensors, softplus, reverse, every, name)
    state = states[:, -1].transpose(1, 2) if x.shape[1] else states.new_zeros(x.shape[0], *a.shape)
    return y.to(x.dtype), state.detach()


def _check(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, bias: Tensor | None) -> None:
    if x.ndim != 3 or a.ndim != 2:
        raise UsageError(f"x must be (images, tokens, channels) and a (channels, states), got {tuple(x.shape)} and {tuple(a.shape)}")
    images, length, channels = x.shape
    states = a.shape[1]
    shapes = dict(delta=(images, length, channels), a=(channels, states), b=(images, length, states), c=(images, length, states))
    given: dict[str, Tensor | None] = dict(delta=delta, a=a, b=b, c=c, skip=skip, bias=bias)
    for name, tensor in given.items():
        accepted = shapes.get(name, (channels,))
        if tensor is not None and tuple(tensor.shape) != accepted:
            raise UsageError(f"with x {tuple(x.shape)} and {states} states, {name} must be {accepted}, got {tuple(tensor.shape)}")


def _needs_operators() -> bool:
    """Return whether the graph being traced must run without this library, or a function transform is active."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def _with_operators(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    delta = F.softplus(delta + bias) if softplus else delta + bias
    inputs = [v.flip(1) for v in (x, delta, b, c)] if reverse else [x, delta, b, c]
    y, state = scan_doubling(inputs[0], inputs[1], a, *inputs[2:])
    return (y.flip(1) if reverse else y) + skip * x, state


def _spacing(states: int) -> int:
    """Return the number of tokens between two kept states: a power of two, at least four times the states."""
    return max(64, 4 << max(0, states - 1).bit_length())
