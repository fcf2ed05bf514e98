"""Selective scan in Triton: one program per image and block of channels, chunk by chunk, each chunk by a parallel prefix.

The tokens of a chunk are scanned in parallel (s -> p s + q composes associatively) and continue from the state before it. The backward
pass keeps one state per chunk and recomputes the others: exp(delta_t a) s_{t-1} is s_t minus the drive of token t, so no shift is needed;
the adjoint is a scan in the other direction, with the decay of the next token. Gradients to b and c are summed over the blocks of channels
in no fixed order.

Values may be half precision in memory; arithmetic and states are float32 (float64 for float64).
Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1, set before this is imported), as the tests do.
Notation: as in reference.py; i image, K tokens per chunk, W channels per block; here a is (N, D).
"""

# ruff: noqa: N803 - compile-time constants are in capitals in Triton

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitarium.errors import UsageError

CHUNK = 64
WIDTH = 16


@triton.jit
def _compose(p1, q1, p2, q2):
    return p1 * p2, p2 * q1 + q2


@triton.jit
def _softplus(v):
    return tl.maximum(v, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(v)))


@triton.jit
def _step_sizes(raw, bias, at, mask, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """Return the step sizes before and after the softplus, (K, W); they are 0 outside, where a token leaves the state unchanged."""
    v = tl.load(raw + at, mask, 0.0).to(EXACT) + bias[None, :]
    delta = _softplus(v) if SOFTPLUS else v
    return v, tl.where(mask, delta, 0.0)


@triton.jit
def _forward_kernel(
    x, raw, a, b, c, skip, bias, y, states, length, channels, count, slots,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * W + tl.arange(0, W)
    inside = d < channels
    j = tl.arange(0, K)
    skip_d = tl.load(skip + d, inside, 0.0)
    bias_d = tl.load(bias + d, inside, 0.0)
    for chunk in range(tl.cdiv(length, K)):
        t = chunk * K + j
        valid = t < length
        place = i * length + (length - 1 - t if REVERSE else t)
        at = place[:, None] * channels + d[None, :]
        mask = valid[:, None] & inside[None, :]
        x_t = tl.load(x + at, mask, 0.0).to(EXACT)
        _, delta = _step_sizes(raw, bias_d, at, mask, SOFTPLUS, EXACT)
        drive = delta * x_t
        out = skip_d[None, :] * x_t
        before = (i * slots + (chunk + slots - 1) % slots) * count
        after = (i * slots + chunk % slots) * count
        for n in range(count):
            a_n = tl.load(a + n * channels + d, inside, 0.0)
            b_n = tl.load(b + place * count + n, valid, 0.0).to(EXACT)
            c_n = tl.load(c + place * count + n, valid, 0.0).to(EXACT)
            p, q = tl.associative_scan((tl.exp(delta * a_n[None, :]), drive * b_n[:, None]), 0, _compose)
            carried = tl.load(states + (before + n) * channels + d, inside & (tl.zeros((W,), tl.int32) < chunk), 0.0)
            s = p * carried[None, :] + q
            out += s * c_n[:, None]
            tl.store(states + (after + n) * channels + d, tl.sum(tl.where(j[:, None] == K - 1, s, 0.0), 0), inside)
        tl.store(y + at, out, mask)
        tl.debug_barrier()  # the states are read by other threads than those that wrote them


@triton.jit
def _backward_kernel(
    grad, x, raw, a, b, c, skip, bias, states, adjoints, grad_x, grad_raw, grad_a, grad_b, grad_c, grad_skip, grad_bias,
    length, channels, count,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * W + tl.arange(0, W)
    inside = d < channels
    j = tl.arange(0, K)
    skip_d = tl.load(skip + d, inside, 0.0)
    bias_d = tl.load(bias + d, inside, 0.0)
    sum_skip = tl.zeros((W,), EXACT)
    sum_bias = tl.zeros((W,), EXACT)
    chunks = tl.cdiv(length, K)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * K + j
        valid = t < length
        place = i * length + (length - 1 - t if REVERSE else t)
        at = place[:, None] * channels + d[None, :]
        mask = valid[:, None] & inside[None, :]
        following = at - channels if REVERSE else at + channels
        x_t = tl.load(x + at, mask, 0.0).to(EXACT)
        g_t = tl.load(grad + at, mask, 0.0).to(EXACT)
        v, delta = _step_sizes(raw, bias_d, at, mask, SOFTPLUS, EXACT)
        _, delta_next = _step_sizes(raw, bias_d, following, mask & (t + 1 < length)[:, None], SOFTPLUS, EXACT)
        drive = delta * x_t
        started = tl.zeros((W,), tl.int32) < chunk
        g_delta = tl.zeros((K, W), EXACT)
        g_drive = tl.zeros((K, W), EXACT)
        for n in range(count):
            a_n = tl.load(a + n * channels + d, inside, 0.0)
            b_n = tl.load(b + place * count + n, valid, 0.0).to(EXACT)
            c_n = tl.load(c + place * count + n, valid, 0.0).to(EXACT)
            driven = drive * b_n[:, None]
            p, q = tl.associative_scan((tl.exp(delta * a_n[None, :]), driven), 0, _compose)
            before = ((i * chunks + chunk - 1) * count + n) * channels + d
            s = p * tl.load(states + before, inside & started, 0.0)[None, :] + q
            p, q = tl.associative_scan((tl.exp(delta_next * a_n[None, :]), g_t * c_n[:, None]), 0, _compose, reverse=True)
            slot = ((i * 2 + back % 2) * count + n) * channels + d
            other = ((i * 2 + (back + 1) % 2) * count + n) * channels + d
            g = p * tl.load(adjoints + other, inside & (tl.zeros((W,), tl.int32) < back), 0.0)[None, :] + q
            tl.store(adjoints + slot, tl.sum(tl.where(j[:, None] == 0, g, 0.0), 0), inside)
            ratio = g * (s - driven)
            g_delta += ratio * a_n[None, :]
            g_drive += g * b_n[:, None]
            tl.store(grad_a + ((i * chunks + chunk) * count + n) * channels + d, tl.sum(ratio * delta, 0), inside)
            tl.atomic_add(grad_b + place * count + n, tl.sum(g * drive, 1), valid)
            tl.atomic_add(grad_c + place * count + n, tl.sum(g_t * s, 1), valid)
        g_raw = g_delta + g_drive * x_t
        if SOFTPLUS:
            g_raw = g_raw / (1.0 + tl.exp(-v))
        g_raw = tl.where(mask, g_raw, 0.0)
        tl.store(grad_x + at, skip_d[None, :] * g_t + g_drive * delta, mask)
        tl.store(grad_raw + at, g_raw, mask)
        sum_skip += tl.sum(g_t * x_t, 0)
        sum_bias += tl.sum(g_raw, 0)
        tl.debug_barrier()
    tl.store(grad_skip + i * channels + d, sum_skip, inside)
    tl.store(grad_bias + i * channels + d, sum_bias, inside)


def forward(
    x: Tensor, raw: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, softplus: bool, reverse: bool, every: int
) -> tuple[Tensor, Tensor]:
    """Run the scan forward: y, (I, L, D), and the kept states, (I, ceil(L / every), N, D). See `dispatch.selective_scan`; a is (D, N)."""
    _check_device(x)
    x, raw, b, c = (v.contiguous() for v in (x, raw, b, c))
    images, length, channels = x.shape
    kept = -(-length // every)
    chunk = every if kept > 1 else CHUNK
    chunks = -(-length // chunk)
    slots = chunks if kept > 1 else 2  # if no state is kept, the last two alternate
    states = a.new_empty(images, slots, a.shape[1], channels)
    y = torch.empty_like(x)
    _forward_kernel[_grid(x)](
        x, raw, a.T.contiguous(), b, c, skip, bias, y, states, length, channels, a.shape[1], slots, **_options(a, softplus, reverse, chunk)
    )
    if kept == 1:
        states = states[:, (chunks - 1) % 2][:, None].contiguous()
    return y, states


def backward(
    grad: Tensor, x: Tensor, raw: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, states: Tensor,
    softplus: bool, reverse: bool, every: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients to x, raw, a, b, c, skip and bias from that to y."""
    grad, x, raw, b, c, states = (v.contiguous() for v in (grad, x, raw, b, c, states))
    images, length, channels = x.shape
    adjoints = a.new_empty(images, 2, a.shape[1], channels)
    grad_x, grad_raw, parts = torch.empty_like(x), torch.empty_like(raw), torch.empty_like(states)
    grad_b, grad_c = a.new_zeros(b.shape), a.new_zeros(c.shape)
    grad_skip, grad_bias = a.new_empty(images, channels), a.new_empty(images, channels)
    _backward_kernel[_grid(x)](
        grad, x, raw, a.T.contiguous(), b, c, skip, bias, states, adjoints, grad_x, grad_raw, parts, grad_b, grad_c, grad_skip, grad_bias,
        length, channels, a.shape[1], **_options(a, softplus, reverse, every),
    )  # fmt: skip
    grad_a = parts.sum((0, 1)).T.contiguous()
    return grad_x, grad_raw, grad_a, grad_b.to(b.dtype), grad_c.to(c.dtype), grad_skip.sum(0), grad_bias.sum(0)


def _check_device(x: Tensor) -> None:
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise UsageError(
            "Triton's scan needs a GPU, got tensors on the CPU; use implementation='auto' (or set TRITON_INTERPRET=1 to debug)"
        )


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[2] // WIDTH)


def _options(a: Tensor, softplus: bool, reverse: bool, chunk: int) -> dict[str, Any]:
    exact = tl.float64 if a.dtype is torch.float64 else tl.float32
    return dict(SOFTPLUS=softplus, REVERSE=reverse, K=chunk, W=WIDTH, EXACT=exact)
