"""Classifier heads without pretrained weights: marked when a model is created, and rejected when a prediction would use them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError


@dataclass(frozen=True)
class FreshHead:
    """Parameters of a head that were initialised at random because the weights have no head.

    Args:
        values: name of a parameter -> its value when it was drawn, a copy on the CPU.
        reason: what the weights lack, for messages.
    """

    values: dict[str, Tensor]
    reason: str


def mark_fresh(model: nn.Module, names: Iterable[str], reason: str) -> None:
    """Record that these parameters of a head are untrained (`model.fresh_head`). The mark becomes void once they are trained."""
    parameters = dict(model.named_parameters())
    values = {
        name: parameters[name].detach().cpu().clone() for name in sorted(names) if name in parameters and not parameters[name].is_meta
    }
    model.fresh_head = FreshHead(values, reason) if values else None  # type: ignore[assignment]


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a model's classifier (of both, in a distilled model)."""
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    heads = found if isinstance(found, tuple | list) else (found,)
    own = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in own]


def fresh_names(model: nn.Module) -> list[str]:
    """Return the parameters of the head that still have the random values of `mark_fresh`; empty once any was trained or replaced."""
    mark: FreshHead | None = getattr(model, "fresh_head", None)
    if mark is None:
        return []
    now = dict(model.named_parameters())
    same = [
        name
        for name, drawn in mark.values.items()
        if name in now and now[name].shape == drawn.shape and torch.equal(now[name].detach().cpu(), drawn.to(now[name].dtype))
    ]
    return same if len(same) == len(mark.values) else []


def has_trained_head(model: nn.Module) -> bool:
    """Return whether a model's predictions may be used; False if `require_head` raises for it."""
    try:
        require_head(model)
    except UsageError:
        return False
    return True


def require_head(model: nn.Module) -> None:
    """Raise UsageError for a model with an untrained classifier head or without classifier.

    A model that was created without any weights is accepted, because it is untrained as a whole.

    Raises:
        UsageError: the weights have no head; the message has a remedy.
    """
    name = getattr(getattr(model, "spec", None), "name", type(model).__name__)
    start = "--pretrained" if getattr(model, "weights_from", None) in (None, "pretrained:") else "--checkpoint FILE"
    advice = (
        f"train one (vitarium train mae_finetune --model {shlex.quote(name)} {start} --data DATA) or use probe or index, which need none"
    )
    if names := fresh_names(model):
        mark: Any = model.fresh_head
        raise UsageError(f"the classifier of {name} is untrained ({', '.join(names)}: {mark.reason}); {advice}")
    if getattr(model, "num_classes", None) == 0 and hasattr(model, "get_classifier") and not head_names(model):
        raise UsageError(f"{name} has no classifier: its weights hold none; {advice}")
