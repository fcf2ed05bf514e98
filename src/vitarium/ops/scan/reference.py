"""Selective scan in plain tensor operators: token by token, as a time-major loop with its own backward pass, and as a parallel prefix.

All forms take final step sizes; `dispatch.py` applies bias, softplus and direction.
Notation: I images (batch), L tokens, D channels, N states per channel, K tokens between two kept states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_step(state: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Process one token: s <- exp(delta a) s + delta x b, y = <c, s>.

    Args:
        state: (I, D, N).
        x, delta: (I, D), input and step size.
        a: (D, N), negative for a decaying state.
        b, c: (I, N), input and output weights of the states.

    Returns:
        y, (I, D), and the new state, (I, D, N).

    Source: mamba's `selective_state_update`; Euler's rule for b instead of the exact zero-order hold.
    """
    state = torch.exp(delta[..., None] * a) * state + (delta * x)[..., None] * b[:, None]
    return (state * c[:, None]).sum(-1), state


def scan_reference(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Loop over `scan_step`: x, delta (I, L, D), b, c (I, L, N) -> y (I, L, D), last state (I, D, N). The tests' reference."""
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for t in range(x.shape[1]):
        y, state = scan_step(state, x[:, t], delta[:, t], a, b[:, t], c[:, t])
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x), state


def scan_doubling(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Scan in ceil(log2 L) steps of whole-sequence operators, for graphs that cannot hold a loop or a custom kernel.

    A token maps the state as s -> p s + q, which composes associatively: (p1, q1) then (p2, q2) is (p1 p2, p2 q1 + q2); p lies in (0, 1]
    for a <= 0, so nothing overflows. It holds (I, L, D, N) values in memory and is about five times slower on a CPU than a loop.
    """
    decay = torch.exp(delta[..., None] * a)
    state = (delta * x)[..., None] * b[:, :, None]
    span = 1
    while span < x.shape[1]:
        state = torch.cat([state[:, :span], decay[:, span:] * state[:, :-span] + state[:, span:]], 1)
        decay = torch.cat([decay[:, :span], decay[:, span:] * decay[:, :-span]], 1)
        span *= 2
    last = state[:, -1] if x.shape[1] else x.new_zeros(x.shape[0], *a.shape)
    return (state * c[:, :, None]).sum(-1), last


def scan_matrix(delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the scan as an attention matrix: y_t = sum over s <= t of M[t, s] x_s.

    Args:
        delta: (I, L, D), step sizes.
        a: (D, N).
        b, c: (I, L, N).

    Returns:
        M, (I, D, L, L), lower triangular: <c_t, exp(a (delta_{s+1} + ... + delta_t)) b_s> delta_s, the "hidden attention" of Ali et al.
        (2024). Quadratic in tokens; used for drawings only.
    """
    elapsed = delta.cumsum(1).transpose(1, 2)  # (I, D, L)
    between = (elapsed[..., :, None] - elapsed[..., None, :]).clamp(min=0)  # future tokens would overflow before they are masked
    matrix = torch.zeros_like(between)
    for n in range(a.shape[1]):
        matrix += torch.exp(a[:, n, None, None] * between) * (c[:, None, :, None, n] * b[:, None, None, :, n])
    return (matrix * delta.transpose(1, 2)[:, :, None]).tril()


def _chunk_states(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return decays and states of K tokens, time-major: x, delta (K, I, D), b (K, I, N), state before (I, D, N) -> two of (K, I, D, N)."""
    decay = torch.exp(delta[..., None] * a)
    states = (delta * x)[..., None] * b[:, :, None]
    for decay_t, state_t in zip(decay, states, strict=True):
        state = torch.addcmul(state_t, decay_t, state, out=state_t)
    return decay, states


def loop_forward(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Scan in a time-major loop, for devices without a kernel, with a buffer for the states of `every` tokens.

    Returns:
        y, (I, L, D), and the states after each `every` tokens and after the last, (I, ceil(L / every), N, D).
    """
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs, kept = [], []
    pieces = [v.transpose(0, 1).split(every) for v in (x, delta, b, c)]
    for x_k, delta_k, b_k, c_k in zip(*pieces, strict=True):
        _, states = _chunk_states(x_k, delta_k, a, b_k, state)
        outputs.append(torch.matmul(states, c_k[..., None])[..., 0])
        state = states[-1].clone()
        kept.append(state.transpose(1, 2))
    return torch.cat(outputs).transpose(0, 1).contiguous(), torch.stack(kept, 1)


def loop_backward(
    grad: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, states: Tensor, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to x, delta, a, b, c from that to y, (I, L, D); states are recomputed per chunk from the one kept before it.

    The adjoint runs backwards, g_t = c_t grad_t + exp(delta_{t+1} a) g_{t+1}; with r_t = g_t exp(delta_t a) s_{t-1} the rest is local.
    """
    pieces = [v.transpose(0, 1).split(every) for v in (grad, x, delta, b, c)]
    zero = x.new_zeros(x.shape[0], *a.shape)
    carried, grad_a, found = zero, torch.zeros_like(a), []
    for k, (grad_k, x_k, delta_k, b_k, c_k) in reversed(list(enumerate(zip(*pieces, strict=True)))):
        before = states[:, k - 1].transpose(1, 2) if k else zero
        decay, state = _chunk_states(x_k, delta_k, a, b_k, before)
        adjoint = grad_k[..., None] * c_k[:, :, None]
        for decay_t, adjoint_t in zip(reversed(decay.unbind()), reversed(adjoint.unbind()), strict=True):
            adjoint_t += carried
            carried = decay_t * adjoint_t
        previous = torch.cat([before[None], state[:-1]])
        ratio = adjoint * decay * previous
        drive = torch.matmul(adjoint, b_k[..., None])[..., 0]  # gradient to delta x
        grad_a += (ratio * delta_k[..., None]).sum((0, 1))
        found.append(
            (
                drive * delta_k,
                (ratio * a).sum(-1) + drive * x_k,
                torch.matmul((delta_k * x_k)[:, :, None], adjoint)[:, :, 0],
                torch.matmul(grad_k[:, :, None], state)[:, :, 0],
            )
        )
    grad_x, grad_delta, grad_b, grad_c = (torch.cat(parts[::-1]).transpose(0, 1).contiguous() for parts in zip(*found, strict=True))
    return grad_x, grad_delta, grad_a, grad_b, grad_c
