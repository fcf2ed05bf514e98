"""Zeros among the weights: which weights they may hit, where they go, and how they stay.

A pruned weight is exactly zero, and the zero is its mask: nothing else is stored, so that a file, a moving average or a resumed run knows
the mask from the weights. (A weight that was zero before counts as pruned too.)
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError, nearest

Value = TypeVar("Value")

NORMS = (nn.LayerNorm, nn.RMSNorm)


def prunable(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = (), *, norms: bool = True) -> dict[str, Tensor]:
    """The weights that may be pruned, by name: of linear layers and convolutions, and (`norms`) the scales of layer norms in blocks.

    Biases, class tokens, position tables and the norms outside of blocks (the last one) are never among them: the list of the paper.

    Args:
        model: any.
        include, exclude: shell patterns of names, such as "blocks.*.mlp.*", or parts of names, such as "head"; none includes all.
        norms: whether scales of norms count.

    Raises:
        UsageError: a pattern that fits no weight.
    """
    found: dict[str, Tensor] = {}
    for place, module in model.named_modules():  # a module that is used twice comes once
        for name, weight in module._parameters.items():
            if weight is None or not _counts(place, module, name, norms) or any(weight is other for other in found.values()):
                continue
            found[f"{place}.{name}".lstrip(".")] = weight
    return chosen(found, include, exclude)


def chosen(found: Mapping[str, Value], include: Iterable[str], exclude: Iterable[str]) -> dict[str, Value]:
    """What is included (all, without a pattern) and not excluded, by name.

    Raises:
        UsageError: a pattern that fits no name.
    """
    fits: Callable[[str, str], bool] = lambda name, pattern: fnmatch.fnmatch(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    for pattern in (*include, *exclude):
        if not any(fits(name, pattern) for name in found):
            raise UsageError(f"nothing to prune is called {pattern!r}{nearest(pattern, found)} (such as {', '.join(list(found)[:3])})")
    wanted = list(include) or ["*"]
    return {n: v for n, v in found.items() if any(fits(n, p) for p in wanted) and not any(fits(n, p) for p in exclude)}


def _counts(place: str, module: nn.Module, name: str, norms: bool) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return name == "in_proj_weight"
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return name == "weight"
    in_block = any(part.isdigit() for part in place.split("."))
    return norms and in_block and name == "weight" and isinstance(module, NORMS)


# ---- where the zeros go: scores -> masks, True where a weight stays


def keep_largest(scores: Mapping[str, Tensor], amount: float, *, together: bool) -> dict[str, Tensor]:
    """Masks that remove the share `amount` with the smallest scores: round(amount * count) of all weights together, or of each tensor.

    Of equal scores the first in order go. Any shapes -> bool masks of the same shapes.
    """
    if not together:
        return {name: mask for name, score in scores.items() for mask in keep_largest({name: score}, amount, together=True).values()}
    flat = torch.cat([score.flatten().float() for score in scores.values()]) if scores else torch.empty(0)
    count = round(amount * flat.numel())
    if count == 0:
        kept = torch.ones_like(flat, dtype=torch.bool)
    else:
        threshold = flat.kthvalue(count).values
        kept = flat > threshold
        ties = (flat == threshold).nonzero().flatten()
        kept[ties[count - int((flat < threshold).sum()) :]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n largest of every m consecutive inputs of a layer: (out, in) -> (out, in), in divisible by m.

    2 of 4 is the pattern that sparse tensor cores run (NVIDIA Ampere and later). Of equal scores the first stay.
    """
    groups = score.unflatten(1, (-1, m))
    order = groups.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :n], True).flatten(1)


@torch.no_grad()
def set_zeros(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Zero, in place, what the masks do not keep."""
    for name, mask in kept.items():
        tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)


# ---- how they stay


class Masks:
    """Zeros that survive an optimizer: what is zero in these tensors as a step begins is zero again when it ends.

        Masks.of(model).hold(optimizer)              # for a loop of one's own; the learner "sparse_prune" does the same

    Args:
        tensors: name -> weight.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        self._zeros: list[Tensor] = []

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """Of a model that a pruning method is on.

        Raises:
            UsageError: there is none on it.
        """
        names = [site for report in getattr(model, "methods", ()) if report.method.kind == "prune" for site in report.sites]
        if not names:
            raise UsageError("no pruning method is on this model; vitarium.apply(model, 'sparse_prune') first")
        own = dict(model.named_parameters(remove_duplicate=False))
        return cls({name: own[name] for name in names if name in own})

    @torch.no_grad()
    def remember(self) -> None:
        """Note where zeros are; before a step."""
        self._zeros = [tensor == 0 for tensor in self.tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the noted zeros back; after a step."""
        for tensor, zeros in zip(self.tensors.values(), self._zeros, strict=False):
            tensor.masked_fill_(zeros, 0)

    def hold(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Do both around every step of an optimizer. Returns the hooks' handles (`remove()` lets the weights grow again)."""
        return [
            optimizer.register_step_pre_hook(lambda *_: self.remember()),
            optimizer.register_step_post_hook(lambda *_: self.restore()),
        ]


# ---- what is there


@dataclass(frozen=True)
class Sparsity:
    """How sparse a model is.

    Args:
        zeros, total: weights that are zero, and all that could be.
        bytes: that these weights take, zeros included.
        packed_bytes: what they would take as one bit a weight and the values that are left, where that is less.
        tensors: name -> share of zeros.
    """

    zeros: int
    total: int
    bytes: int
    packed_bytes: int
    tensors: dict[str, float]

    @property
    def share(self) -> float:
        """Of zeros, 0..1."""
        return self.zeros / max(1, self.total)

    @property
    def empty(self) -> list[str]:
        """Names of the weights of which nothing is left."""
        return [name for name, share in self.tensors.items() if share == 1]


def sparsity(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Sparsity:
    """Count the zeros among the weights that `prunable` lists."""
    weights = prunable(model, include, exclude)
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    whole = {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
    packed = [min(whole[n], -(-w.numel() // 8) + (w.numel() - zeros[n]) * w.element_size()) for n, w in weights.items()]
    shares = {name: zeros[name] / max(1, weight.numel()) for name, weight in weights.items()}
    return Sparsity(sum(zeros.values()), sum(w.numel() for w in weights.values()), sum(whole.values()), sum(packed), shares)
