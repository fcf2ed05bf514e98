"""Vim's mixer: selective scans in one or two directions with a gate, in a block with a norm and a residual."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import DropPath, EvalCache, Linear, apply_rotary, layer_scale_gamma
from vitarium.ops.linear import linear
from vitarium.ops.scan import causal_conv_silu, scan_matrix, selective_scan

DIRECTIONS = ("forward", "backward")


class ScanDirection(nn.Module):
    """Convolution and selective scan in one direction, with separate weights: (B, L, E) -> (B, L, E).

    Args:
        dim: inner channels E.
        d_state: states N per channel.
        dt_rank: rank R of the step sizes.
        d_conv: kernel size of the convolution.
        direction: "forward" or "backward".
        scan: implementation, as for `vitarium.ops.scan.selective_scan`.
    """

    def __init__(self, dim: int, d_state: int, dt_rank: int, d_conv: int, direction: str, scan: str):
        super().__init__()
        self.reverse = direction == "backward"
        self.scan = scan
        self.sizes = [dt_rank, d_state, d_state]
        self.cache = EvalCache()
        self.conv1d = nn.Conv1d(dim, dim, d_conv, groups=dim)
        self.x_proj = Linear(dim, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, dim)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        step = torch.exp(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, u: Tensor) -> Tensor:
        v, dt, b, c = self.parts(u)
        delta = linear(dt, self.dt_proj.weight)
        total: Tensor | None = None
        for name, table, reverse in self.scans():
            rate = self.cache.get(self, name, table, functools.partial(decay, table))
            options = dict(bias=self.dt_proj.bias, softplus=True, reverse=reverse, implementation=self.scan)
            y, _ = selective_scan(v, delta, rate, b, c, self.D, **options)  # type: ignore[arg-type]
            total = y if total is None else total + y
        assert total is not None
        return total

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the convolved channels v (B, L, E), and their step sizes (B, L, R), writing and reading vectors b and c (B, L, N)."""
        assert self.conv1d.bias is not None
        v = causal_conv_silu(u, self.conv1d.weight[:, 0], self.conv1d.bias, reverse=self.reverse)
        dt, b, c = self.x_proj(v).split(self.sizes, -1)
        return v, dt, b, c

    def scans(self) -> list[tuple[str, Tensor, bool]]:
        """Return name, logarithm of the decay rates (E, N), and whether it runs backward, of each scan; their outputs are added."""
        return [("rate", self.A_log, self.reverse)]

    def attention(self, u: Tensor) -> Tensor:
        """Return the absolute weights of the scans as a matrix, averaged over channels: u (B, L, E) -> (B, L, L); quadratic in L."""
        _, dt, *vectors = self.parts(u)
        steps = F.softplus(self.dt_proj(dt))
        found = []
        for _, table, reverse in self.scans():
            delta, b, c = (part.flip(1) if reverse else part for part in (steps, *vectors))
            rate, some = decay(table), range(0, delta.shape[2], 32)  # a few channels at a time, to limit the memory of their matrices
            total = sum(scan_matrix(delta[..., i : i + 32], rate[i : i + 32], b, c).abs().sum(1) for i in some) / delta.shape[2]
            assert isinstance(total, Tensor)
            found.append(total.flip(1, 2) if reverse else total)
        return torch.stack(found).mean(0)

    def extra_repr(self) -> str:
        return f"direction={'backward' if self.reverse else 'forward'}, scan={self.scan}"


class SharedScan(ScanDirection):
    """Scans in both directions with the same weights except the decay rates, after a causal convolution (the authors' "v1")."""

    def __init__(self, dim: int, d_state: int, dt_rank: int, d_conv: int, scan: str):
        super().__init__(dim, d_state, dt_rank, d_conv, "forward", scan)
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())

    def scans(self) -> list[tuple[str, Tensor, bool]]:
        return [*super().scans(), ("backward", self.A_b_log, True)]


def decay(table: Tensor) -> Tensor:
    """Return the decay rates A, (E, N), in at least float32, of their logarithms."""
    return -torch.exp(table.to(torch.float64 if table.dtype is torch.float64 else torch.float32))


class VimMixer(nn.Module):
    """Mamba token mixer with scans along the sequence, a replacement for attention: (B, L, dim) -> (B, L, dim).

    Args:
        dim: channels.
        d_state, d_conv: states per channel, kernel size of the convolution.
        expand: ratio of inner channels to channels.
        directions: "forward" or "backward" for each scan; scans have separate weights.
        shared: one `SharedScan` in place of `directions`.
        average: average the outputs of `directions`, or add them.
        layer_scale: initial value of factors on the output channels; 0 for none.
        scan: implementation, as for `vitarium.ops.scan.selective_scan`.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        directions: Sequence[str] = DIRECTIONS,
        shared: bool = False,
        average: bool = True,
        layer_scale: float = 0.0,
        scan: str = "auto",
    ):
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        scans = [ScanDirection(inner, d_state, rank, d_conv, name, scan) for name in directions]
        self.directions = nn.ModuleList([SharedScan(inner, d_state, rank, d_conv, scan)] if shared else scans)
        self.average = average
        self.out_proj = Linear(inner, dim, bias=False)
        self.gamma = layer_scale_gamma(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        first, *others = (scan(u) for scan in self.directions)
        for y in others:
            first = first + y
        out = self.out_proj(first * F.silu(z))
        out = out / len(self.directions) if self.average else out
        return out if self.gamma is None else out * self.gamma

    def attention(self, x: Tensor) -> Tensor:
        """Return the implicit attention of tokens (B, L, dim), averaged over directions: (B, L, L), row = output, column = input."""
        u, _ = self.in_proj(x).chunk(2, -1)
        return torch.stack([scan.attention(u) for scan in self.directions]).mean(0)  # type: ignore[operator]


class RMSNorm(nn.RMSNorm):
    """RMS norm computed in the precision of x and returned in that of the weight, since the residual stream may be more precise."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precisions of `RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


class VimBlock(nn.Module):
    """Pre-norm residual block with a `VimMixer`: (B, L, C) -> the same shape.

    Args:
        dim: channels C.
        drop_path: stochastic depth rate.
        norm: one of NORMS.
        options: as for `VimMixer`.
    """

    def __init__(self, dim: int, drop_path: float, norm: str, **options: Any):
        super().__init__()
        self.norm = NORMS[norm](dim, eps=1e-5)
        self.mixer = VimMixer(dim, **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Run the block; a rotary table (2, L, C) rotates the branch before it is added."""
        branch = self.drop_path(self.mixer(self.norm(x)))
        return x + (branch if rotary is None else apply_rotary(branch, rotary))
