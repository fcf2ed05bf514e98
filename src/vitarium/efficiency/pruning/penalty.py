"""Penalties on attention weights for any model that `anatomy` supports, computed by hooks during the loss only.

    penalty = AttentionPenalty("log1p_sq", weight=0.01, blocks="last")
    with penalty.watch(model) as term:
        logits = model(image)
    loss = cross_entropy(logits, target) + term()

Notation: B images, H heads, N tokens; A (B, H, N, N) attention weights after the softmax, Z the logits before it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitarium import anatomy
from vitarium.errors import UnsupportedModel, UsageError, nearest


def log1p_sq(logits: Tensor) -> Tensor:
    """Return mean log(1 + A^2): log(1 + 1/N^2) for uniform attention, up to log(2)/N if each row attends to one token."""
    return logits.softmax(-1).square().log1p().mean()


def l1(logits: Tensor) -> Tensor:
    """Return mean |Z|: small logits mean uniform attention."""
    return logits.abs().mean()


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the rows over log N: 1 for uniform attention, 0 if each row attends to one token."""
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1).mean() / math.log(max(2, logits.shape[-1]))


def hoyer(logits: Tensor) -> Tensor:
    """Return 1 - Hoyer's sparsity, mean over the rows: 1 for uniform attention, 0 if each row attends to one token."""
    root = math.sqrt(max(2, logits.shape[-1]))
    return 1 - (root - 1 / logits.softmax(-1).norm(dim=-1)).mean() / (root - 1)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"log1p_sq": log1p_sq, "l1": l1, "entropy": entropy, "hoyer": hoyer}
"""Penalties by name: logits (B, H, N, N) -> scalar."""


@dataclass(frozen=True)
class AttentionPenalty:
    """A loss term on the attention of a vision transformer.

    The published penalty, log1p_sq, is smallest for *uniform* attention: it favours many small weights, not few large ones. For sparse
    attention use "entropy" or "hoyer" (or weight=-0.01).

    Args:
        kind: "log1p_sq" (the paper's), "l1", "entropy" or "hoyer".
        weight: factor in the loss; a negative one inverts the penalty.
        blocks: "last" (as in the authors' code) or "all" (the mean over the blocks).
    """

    kind: str = "log1p_sq"
    weight: float = 0.01
    blocks: str = "last"

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            raise UsageError(f"kind must be one of {', '.join(PENALTIES)}; got {self.kind!r}{nearest(str(self.kind), PENALTIES)}")
        if self.blocks not in ("last", "all"):
            raise UsageError(f"blocks must be 'last' or 'all', got {self.blocks!r}")

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """Record the model's next forward pass, and yield a function that then returns `weight` times the penalty, with gradients.

        The attention of the watched blocks is computed once more in plain operators (the model's own may be a fused kernel): for "last"
        that is one block's queries, keys and N x N weights.

        Raises:
            UnsupportedModel: anatomy does not support the model, or the model uses rotary position embedding.
        """
        watched = self.watched(model)
        seen: dict[int, Tensor] = {}
        hooks = [block.norm1.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out)) for i, block in enumerate(watched)]

        def term() -> Tensor:
            if len(seen) < len(watched):
                raise UsageError("the penalty has recorded no forward pass of the model: call the model inside 'with penalty.watch(model)'")
            values = []
            for i, block in enumerate(watched):
                q, k, _ = block.attention.qkv(seen[i])
                k = block.attention.repeat_kv(k)
                values.append(PENALTIES[self.kind](q * block.attention.scale @ k.transpose(-2, -1)))
            return self.weight * torch.stack(values).mean()

        try:
            yield term
        finally:
            for hook in hooks:
                hook.remove()

    def watched(self, model: nn.Module) -> list[anatomy.BlockView]:
        """Return the watched blocks. Raises UnsupportedModel, see `watch`."""
        view = anatomy.of(model)
        if view.rotary:
            raise UnsupportedModel(f"{view.family} rotates queries and keys by position; the penalty supports models with added positions")
        return list(view.blocks if self.blocks == "all" else view.blocks[-1:])
