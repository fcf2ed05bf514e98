"""Selective scan on a CPU: loops that numba compiles on their first call (the machine code is cached on disk).

State and adjoint of a range of channels stay in the cache during the loop over tokens; the innermost loops run along the channels, so
that they are vectorised. numba's own exponential is one library call per value, hence the polynomials. Nothing of size tokens times
states is stored: the backward pass recomputes the states chunk by chunk from those that were kept.

Threads: numba's cannot be entered from two Python threads at once, so the pieces run on plain threads; the kernels release the lock.
Notation: as in reference.py; here a is (N, D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

OPTIONS: Any = dict(
    fastmath={"reassoc", "contract", "nsz", "arcp"},  # reordered sums and fused multiply-adds; infinities and NaN keep their meaning
    error_model="numpy",  # a division that can raise is not vectorised
)
NARROWEST = 128  # fewest channels for a thread of its own

_LOG2E = np.float32(math.log2(math.e))
_ONE, _HALF, _BIAS, _MANTISSA = np.float32(1), np.float32(0.5), np.float32(127), np.float32(2**23)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (np.float32(2 / (2 * k + 1)) for k in range(8))


def _kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile on the first call, and cache on disk if the disk can be written."""
    try:
        return njit(nogil=True, cache=True, **OPTIONS)(function)
    except RuntimeError:  # no cache folder
        return njit(nogil=True, **OPTIONS)(function)


def _exp(v):
    raise NotImplementedError  # only exists compiled


def _log1p(v):
    raise NotImplementedError


@overload(_exp, jit_options=OPTIONS)
def _compile_exp(v):
    """exp(v); float32 as 2^k 2^r with |r| <= 1/2 and the power of two built from its bits, to a relative error of 2e-7."""
    if v != types.float32:
        return lambda v: math.exp(v)

    def single(v):
        t = min(max(v * _LOG2E, _LOWEST), _HIGHEST)
        k = np.rint(t)
        r = t - k
        power = _E0 + r * (_E1 + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7))))))
        return power * np.int32((k + _BIAS) * _MANTISSA).view(np.float32)

    return single


@overload(_log1p, jit_options=OPTIONS)
def _compile_log1p(v):
    """log(1 + v) for 0 <= v <= 1; float32 as 2 artanh(q), q = v / (2 + v) <= 1/3, by its series, to a relative error of 1e-7."""
    if v != types.float32:
        return lambda v: math.log1p(v)

    def single(v):
        q = v / (v + (_ONE + _ONE))
        s = q * q
        return q * (_L0 + s * (_L1 + s * (_L2 + s * (_L3 + s * (_L4 + s * (_L5 + s * (_L6 + s * _L7)))))))

    return single


@njit(**OPTIONS)
def _prepare(x, raw, bias, softplus, delta, drive):
    """Compute a token's step sizes, delta = raw + bias or its softplus, and the drive of its states, delta x."""
    for d in range(len(x)):
        delta[d] = raw[d] + bias[d]
    if softplus:  # max(v, 0) + log(1 + exp(-|v|)); the maximum as (v + |v|) / 2, because a comparison with 0 would promote to float64
        for d in range(len(x)):
            size = abs(delta[d])
            delta[d] = (delta[d] + size) * _HALF + _log1p(_exp(-size))
    for d in range(len(x)):
        drive[d] = delta[d] * x[d]


@njit(**OPTIONS)
def _advance(delta, a, drive, b, before, after):
    """Advance one state of each channel by one token: s <- exp(delta a) s + delta x b."""
    for d in range(len(delta)):
        after[d] = _exp(delta[d] * a[d]) * before[d] + drive[d] * b


@njit(**OPTIONS)
def _advance_and_read(delta, a, drive, b, c, state, y):
    """Advance one state of each channel in place, and add c s to y."""
    for d in range(len(delta)):
        s = _exp(delta[d] * a[d]) * state[d] + drive[d] * b
        state[d] = s
        y[d] += s * c


@njit(**OPTIONS)
def _retreat(delta, a, drive, b, c, before, after, grad, adjoint, grad_delta, grad_drive, grad_a):
    """Step one state of each channel back by one token: update the adjoint, add the token's gradients, return those to b and c."""
    grad_b = grad_c = grad[0] - grad[0]
    for d in range(len(delta)):
        g = adjoint[d] + c * grad[d]
        decayed = g * _exp(delta[d] * a[d])
        ratio = decayed * before[d]
        adjoint[d] = decayed
        grad_delta[d] += ratio * a[d]
        grad_a[d] += ratio * delta[d]
        grad_drive[d] += g * b
        grad_b += g * drive[d]
        grad_c += grad[d] * after[d]
    return grad_b, grad_c


@njit(**OPTIONS)
def _finish(x, raw, bias, skip, softplus, grad, delta, grad_delta, grad_drive, grad_x, grad_raw, grad_skip, grad_bias):
    """Convert the gradients to delta and delta x into those to the token's inputs."""
    for d in range(len(x)):
        grad_x[d] = skip[d] * grad[d] + grad_drive[d] * delta[d]
        g = grad_delta[d] + grad_drive[d] * x[d]
        if softplus:  # times its derivative, the logistic function
            v = raw[d] + bias[d]
            w = _exp(-abs(v))
            g *= (_ONE if v >= 0 else w) / (_ONE + w)
        grad_raw[d] = g
        grad_bias[d] += g
        grad_skip[d] += grad[d] * x[d]


@_kernel
def _forward(x, raw, a, b, c, skip, bias, y, states, every, softplus, reverse, first, last, low, high):
    """Fill y, (I, L, D), and states, (I, ceil(L / every), N, D), for images first..last and channels low..high."""
    length, count, width = x.shape[1], a.shape[0], high - low
    state = np.empty((count, width), x.dtype)
    delta = np.empty(width, x.dtype)
    drive = np.empty(width, x.dtype)
    for i in range(first, last):
        state[:] = 0
        for k in range(length):
            t = length - 1 - k if reverse else k
            _prepare(x[i, t, low:high], raw[i, t, low:high], bias[low:high], softplus, delta, drive)
            row = y[i, t, low:high]
            for d in range(width):
                row[d] = skip[low + d] * x[i, t, low + d]
            for n in range(count):
                _advance_and_read(delta, a[n, low:high], drive, b[i, t, n], c[i, t, n], state[n], row)
            if (k + 1) % every == 0 or k + 1 == length:
                states[i, k // every, :, low:high] = state


@_kernel
def _backward(
    grad, x, raw, a, b, c, skip, bias, states, every, softplus, reverse, grad_x, grad_raw, grad_a, grad_b, grad_c, grad_skip, grad_bias,
    first, last, low, high,
):  # fmt: skip
    """Fill grad_x and grad_raw, and add to the other gradients, for images first..last and channels low..high."""
    length, count, width = x.shape[1], a.shape[0], high - low
    inside = np.empty((every + 1, count, width), x.dtype)
    delta = np.empty((every, width), x.dtype)
    drive = np.empty((every, width), x.dtype)
    adjoint = np.empty((count, width), x.dtype)
    grad_delta = np.empty(width, x.dtype)
    grad_drive = np.empty(width, x.dtype)
    for i in range(first, last):
        adjoint[:] = 0
        for chunk in range(states.shape[1] - 1, -1, -1):
            start, stop = chunk * every, min(length, (chunk + 1) * every)
            if chunk:
                inside[0] = states[i, chunk - 1, :, low:high]
            else:
                inside[0] = 0
            for k in range(start, stop):
                t, j = length - 1 - k if reverse else k, k - start
                _prepare(x[i, t, low:high], raw[i, t, low:high], bias[low:high], softplus, delta[j], drive[j])
                for n in range(count):
                    _advance(delta[j], a[n, low:high], drive[j], b[i, t, n], inside[j, n], inside[j + 1, n])
            for k in range(stop - 1, start - 1, -1):
                t, j = length - 1 - k if reverse else k, k - start
                grad_delta[:] = 0
                grad_drive[:] = 0
                g = grad[i, t, low:high]
                for n in range(count):
                    gb, gc = _retreat(
                        delta[j], a[n, low:high], drive[j], b[i, t, n], c[i, t, n], inside[j, n], inside[j + 1, n], g, adjoint[n],
                        grad_delta, grad_drive, grad_a[n, low:high],
                    )  # fmt: skip
                    grad_b[i, t, n] += gb
                    grad_c[i, t, n] += gc
                _finish(
                    x[i, t, low:high], raw[i, t, low:high], bias[low:high], skip[low:high], softplus, g, delta[j], grad_delta, grad_drive,
                    grad_x[i, t, low:high], grad_raw[i, t, low:high], grad_skip[low:high], grad_bias[low:high],
                )  # fmt: skip


@_kernel
def _causal_conv_silu(x, taps, bias, y, reverse, first, last, low, high):
    """Fill y for images first..last and channels low..high; taps are (K, D), the last one multiplies the token itself."""
    length, count, width = x.shape[1], taps.shape[0], high - low
    total = np.empty(width, x.dtype)
    for i in range(first, last):
        for t in range(length):
            total[:] = bias[low:high]
            for k in range(count):
                source = t + (count - 1 - k) if reverse else t - (count - 1 - k)
                if 0 <= source < length:
                    _add_product(x[i, source, low:high], taps[k, low:high], total)
            _silu(total, y[i, t, low:high])


@njit(**OPTIONS)
def _add_product(x, weight, total):
    for d in range(len(total)):
        total[d] += x[d] * weight[d]


@njit(**OPTIONS)
def _silu(x, y):
    for d in range(len(x)):
        y[d] = x[d] / (_ONE + _exp(-x[d]))


def forward(
    x: Tensor, raw: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, softplus: bool, reverse: bool, every: int
) -> tuple[Tensor, Tensor]:
    """Run the scan forward: y, (I, L, D), and the kept states, (I, ceil(L / every), N, D). See `dispatch.selective_scan`; a is (D, N)."""
    y = x.new_empty(x.shape)  # always contiguous: the kernels must not fill a copy
    states = x.new_empty(x.shape[0], -(-x.shape[1] // every), a.shape[1], a.shape[0])
    arrays = _arrays(x, raw, a.T, b, c, skip, bias, y, states)
    _run(x, lambda _, *piece: _forward(*arrays, every, softplus, reverse, *piece))
    return y, states


def backward(
    grad: Tensor, x: Tensor, raw: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor, states: Tensor,
    softplus: bool, reverse: bool, every: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients to x, raw, a, b, c, skip and bias from that to y."""
    pieces = len(_pieces(x))
    grad_x, grad_raw = x.new_empty(x.shape), x.new_empty(x.shape)
    shared = [v.new_zeros(pieces, *v.shape) for v in (a.T, b, c, skip, bias)]  # one copy per thread
    arrays = _arrays(grad, x, raw, a.T, b, c, skip, bias, states)
    own = [grad_x.numpy(), grad_raw.numpy()]
    _run(x, lambda p, *piece: _backward(*arrays, every, softplus, reverse, *own, *(v[p].numpy() for v in shared), *piece))
    grad_a, grad_b, grad_c, grad_skip, grad_bias = (v[0] if pieces == 1 else v.sum(0) for v in shared)
    return grad_x, grad_raw, grad_a.T.contiguous(), grad_b, grad_c, grad_skip, grad_bias


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """Compute `causal_conv.causal_conv_silu` in compiled loops."""
    y = torch.empty(x.shape, dtype=x.dtype)
    arrays = _arrays(x, weight.T, bias, y)
    _run(x, lambda _, *piece: _causal_conv_silu(*arrays, reverse, *piece))
    return y


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _pieces(x: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (first, last, low, high) of each thread: images are divided if there are enough, else channels."""
    images, _, channels = x.shape
    threads = torch.get_num_threads()
    if images >= threads:
        edges = [images * k // threads for k in range(threads + 1)]
        return [(i, j, 0, channels) for i, j in itertools.pairwise(edges)]
    parts = max(1, min(threads, channels // NARROWEST))
    edges = [channels * k // parts for k in range(parts + 1)]
    return [(0, images, i, j) for i, j in itertools.pairwise(edges)]


def _run(x: Tensor, kernel: Callable[..., None]) -> None:
    """Call kernel(number, *piece) for all pieces in parallel."""
    pieces = _pieces(x)
    if len(pieces) == 1:
        return kernel(0, *pieces[0])
    with ThreadPoolExecutor(len(pieces)) as pool:
        list(pool.map(lambda job: kernel(job[0], *job[1]), enumerate(pieces)))
    return None
