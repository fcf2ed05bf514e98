"""Masks of single weights: selection of prunable weights, computation of masks, and preservation of zeros in training.

A pruned weight is exactly zero, and the zero is its mask: nothing else is stored, so that a file, a moving average or a resumed run
recovers the mask from the weights. (A weight that was zero before counts as pruned.)
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
    """Return the weights that can be pruned, by name: of linear layers and convolutions, and (`norms`) the scales of layer norms in blocks.

    Biases, class tokens, position tables and norms outside blocks (the last one) are excluded, as in the paper.

    Args:
        model: any module.
        include, exclude: shell patterns of names, such as "blocks.*.mlp.*", or parts of names, such as "head"; an empty include means all.
        norms: whether scales of norms are included.

    Raises:
        UsageError: a pattern matches no weight.
    """
    found: dict[str, Tensor] = {}
    for place, module in model.named_modules():  # a shared module appears once
        for name, weight in module._parameters.items():
            if weight is None or not _counts(place, module, name, norms) or any(weight is other for other in found.values()):
                continue
            found[f"{place}.{name}".lstrip(".")] = weight
    return chosen(found, include, exclude)


def chosen(found: Mapping[str, Value], include: Iterable[str], exclude: Iterable[str]) -> dict[str, Value]:
    """Return the entries that are included (all, without a pattern) and not excluded, by name.

    Raises:
        UsageError: a pattern matches no name.
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


# ---- scores -> masks, True for kept weights


def keep_largest(scores: Mapping[str, Tensor], amount: float, *, together: bool) -> dict[str, Tensor]:
    """Return masks that remove the share `amount` with the smallest scores: round(amount * count), over all weights or in each tensor.

    Of equal scores the first are removed. Any shapes -> bool masks of the same shapes.
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
    """Return the mask that keeps the n largest of every m consecutive inputs of a layer: (out, in) -> (out, in), in divisible by m.

    2 of 4 is the pattern of sparse tensor cores (NVIDIA Ampere and later). Of equal scores the first are kept.
    """
    groups = score.unflatten(1, (-1, m))
    order = groups.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :n], True).flatten(1)


@torch.no_grad()
def set_zeros(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what the masks do not keep."""
    for name, mask in kept.items():
        tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)


# ---- zeros during training


class Masks:
    """Preservation of zeros in training: entries that are zero before an optimizer step are set to zero after it.

    Masks.of(model).hold(optimizer)              # for a custom loop; the learner "sparse_prune" does the same

    Args:
        tensors: name -> weight.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        self._zeros: list[Tensor] = []

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """Create for a model with a pruning method.

        Raises:
            UsageError: no pruning method is on the model.
        """
        names = [site for report in getattr(model, "methods", ()) if report.method.kind == "prune" for site in report.sites]
        if not names:
            raise UsageError("no pruning method is on this model; vitarium.apply(model, 'sparse_prune') first")
        own = dict(model.named_parameters(remove_duplicate=False))
        return cls({name: own[name] for name in names if name in own})

    @torch.no_grad()
    def remember(self) -> None:
        """Record where the zeros are, before a step."""
        self._zeros = [tensor == 0 for tensor in self.tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the recorded zeros, after a step."""
        for tensor, zeros in zip(self.tensors.values(), self._zeros, strict=False):
            tensor.masked_fill_(zeros, 0)

    def hold(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Record and restore around every step of an optimizer. Returns the hooks' handles; `remove()` lets the weights change again."""
        return [
            optimizer.register_step_pre_hook(lambda *_: self.remember()),
            optimizer.register_step_post_hook(lambda *_: self.restore()),
        ]


# ---- statistics


@dataclass(frozen=True)
class Sparsity:
    """Sparsity of a model.

    Args:
        zeros, total: number of weights that are zero, and of all that can be pruned.
        bytes: memory of these weights, zeros included.
        packed_bytes: memory as one bit per weight and the non-zero values, if that is less.
        tensors: name -> share of zeros.
    """

    zeros: int
    total: int
    bytes: int
    packed_bytes: int
    tensors: dict[str, float]

    @property
    def share(self) -> float:
        """Share of zeros, 0 to 1."""
        return self.zeros / max(1, self.total)

    @property
    def empty(self) -> list[str]:
        """Names of the weights that are entirely zero."""
        return [name for name, share in self.tensors.items() if share == 1]


def sparsity(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Sparsity:
    """Count the zeros among the weights that `prunable` lists."""
    weights = prunable(model, include, exclude)
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    whole = {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
    packed = [min(whole[n], -(-w.numel() // 8) + (w.numel() - zeros[n]) * w.element_size()) for n, w in weights.items()]
    shares = {name: zeros[name] / max(1, weight.numel()) for name, weight in weights.items()}
    return Sparsity(sum(zeros.values()), sum(w.numel() for w in weights.values()), sum(whole.values()), sum(packed), shares)
