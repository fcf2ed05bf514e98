"""Folding of a scale and a shift per channel from a layer norm into the linear layers that follow it.

    x = norm(z),  y = x W^T + c           becomes           x' = (x - b) / s,  y = x' (W s)^T + (c + W b)

with gamma' = gamma / s and beta' = (beta - b) / s. The function is unchanged in floating point, and x' is easier to quantize. SmoothQuant
has b = 0; SQ-b shifts as well; other choices of b and s (re-parameterised zero points, balancing by time step) use the same fold.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitarium.catalog.calling import call
from vitarium.nn.modes import eval_mode, frozen_parameters

CARRIES = {"view", "reshape", "permute", "transpose", "movedim", "flatten", "unflatten", "contiguous", "clone", "roll", "__getitem__",
           "select", "chunk", "split", "unbind", "squeeze", "unsqueeze", "expand", "dropout", "to"}  # fmt: skip
"""Torch functions that do not mix channels and commute with a scale and a shift per channel."""


def sqb(low: Tensor, high: Tensor, weights: Tensor, *, alpha: float = 0.5, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Return SQ-b's shift and scale of each channel.

        b_j = (max_j + min_j) / 2,     s_j = max|X_j - b_j|^alpha / max_i|W_ij|^(1 - alpha),  at least 1e-5

    Args:
        low, high: extremes of each channel, (N,).
        weights: (M, N), stacked if several layers take the channels.
        alpha: share of the difficulty that moves from the input into the weight, in [0, 1].
        shift: False gives SmoothQuant (b = 0).

    Returns:
        b and s, (N,).
    """
    b = (high + low) / 2 if shift else torch.zeros_like(low)
    reach = torch.maximum((low - b).abs(), (high - b).abs())
    column = weights.abs().amax(0)
    s = (reach**alpha / column.clamp(min=1e-12) ** (1 - alpha)).clamp(min=1e-5)
    return b, torch.where((reach == 0) | (column == 0), torch.ones_like(s), s)  # a constant or unused channel needs no balancing


@torch.no_grad()
def fold(norm: nn.LayerNorm, linears: Sequence[nn.Linear], b: Tensor, s: Tensor) -> tuple[dict[str, Tensor], list[nn.Linear]]:
    """Return the folded weights without changing the model.

    Returns:
        new "weight" and "bias" of the norm, and copies of the linear layers with matching weights (each with a bias).
    """
    gamma, beta = norm.weight, norm.bias
    folded = []
    for linear in linears:
        twin = copy.deepcopy(linear)
        twin.weight = nn.Parameter(linear.weight * s, requires_grad=linear.weight.requires_grad)
        bias = linear.weight @ b if linear.bias is None else linear.bias + linear.weight @ b
        twin.bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
        folded.append(twin)
    return {"weight": gamma / s, "bias": (beta - b) / s}, folded


def find_pairs(model: nn.Module, image: Any) -> dict[str, tuple[str, ...]]:
    """Find layer norms whose output goes only into linear layers: name of the norm -> names of the layers.

    The norms' outputs are traced through one forward pass (image: a batch of images, or inputs by name), so any model is accepted.
    """
    trace = _Trace()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None:
            hooks += trace.follow_norm(name, module)
        elif isinstance(module, nn.Linear):
            hooks += trace.follow_linear(name, module)
    try:
        with eval_mode(model), frozen_parameters(model), torch.no_grad(), trace:
            trace.spoil(call(model, image))
    finally:
        for hook in hooks:
            hook.remove()
    return trace.pairs()


class _Trace(TorchFunctionMode):
    """Tracking of the norm that each tensor comes from, while a model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_of: dict[int, str] = {}
        self.alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
        self.readers: dict[str, set[str]] = {}
        self.sources: dict[str, set[str | None]] = {}
        self.spoiled: set[str] = set()
        self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        found = {self.norm_of[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.norm_of}
        if len(found) == 1 and self._carries(func, args, kwargs, result):
            self._mark(result, found.pop())
        else:
            self.spoiled |= found
        return result

    @staticmethod
    def _carries(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Return whether an operation keeps channels separate: no mean over the last axis, no zeros padded beside the tokens."""
        name = getattr(func, "__name__", "")
        if name == "pad":
            return result.shape == args[0].shape
        if name == "mean":
            dims = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            dims = (dims,) if isinstance(dims, int) else dims
            return dims is not None and not any(d in (-1, args[0].ndim - 1) for d in dims)
        return name in CARRIES

    def _mark(self, value: Any, norm: str) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.norm_of[id(leaf)] = norm
                self.alive.append(leaf)

    def spoil(self, value: Any) -> None:
        """Mark tensors that a non-linear consumer uses; they cannot be folded."""
        self.spoiled |= {self.norm_of[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in self.norm_of}

    def follow_norm(self, name: str, module: nn.Module) -> list[Any]:
        """Register hooks that mark a norm's output."""

        def enter(_: nn.Module, inputs: Any) -> None:
            if not self.inside:
                self.spoil(inputs)
            self.inside += 1

        def leave(_: nn.Module, __: Any, output: Tensor) -> None:
            self.inside -= 1
            self.readers.setdefault(name, set())
            self._mark(output, name)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def follow_linear(self, name: str, module: nn.Module) -> list[Any]:
        """Register hooks that record the norm a layer's input comes from."""

        def enter(_: nn.Module, inputs: Any) -> None:
            source = self.norm_of.get(id(inputs[0]))
            self.sources.setdefault(name, set()).add(source)
            if source is not None:
                self.readers[source].add(name)
            self.inside += 1

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self.inside -= 1

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def pairs(self) -> dict[str, tuple[str, ...]]:
        """Return the foldable pairs: all consumers of the norm are linear layers, and each has no other input."""
        alone = {norm: readers for norm, readers in self.readers.items() if readers and norm not in self.spoiled}
        return {norm: tuple(sorted(readers)) for norm, readers in alone.items() if all(self.sources[r] == {norm} for r in readers)}
