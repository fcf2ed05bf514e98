"""What goes from block to block, the block, and what is read behind the last.

Legend: as in the package.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitarium.backbones.dependencyvit.attention import ReversedAttention, precise
from vitarium.nn import DropPath, LayerScale, Mlp
from vitarium.ops.merging import rows
from vitarium.ops.sorting import descending_order

EPS = 1e-6
"""Of every norm."""


class Flow(NamedTuple):
    """What goes from block to block."""

    tokens: Tensor
    """(B, n, C)"""
    messages: Tensor
    """m, (B, n)"""
    place: Tensor | None = None
    """(B, n) int64, the patch that each token is; None while all are there."""
    last: Tensor | None = None
    """(B, N, C) the value of every token when some left for the last time."""

    def restored(self) -> Tensor:
        """(B, N, C): tokens that left have the value they left with."""
        if self.place is None or self.last is None:
            return self.tokens
        return self.last.scatter(1, over_channels(self.place, self.tokens), self.tokens)


def start(tokens: Tensor) -> Flow:
    """Tokens (B, N, C), all of them sending."""
    return Flow(tokens, precise(torch.ones_like(tokens[..., 0])))


def over_channels(place: Tensor, tokens: Tensor) -> Tensor:
    """Places (B, n) as those of each channel of tokens, (B, n, C)."""
    return place[..., None].expand(-1, -1, tokens.shape[-1])


class DependencyBlock(nn.Module):
    """Reversed attention, perhaps a farewell to some tokens, MLP: Flow -> Flow.

    Args:
        dim, num_heads: channels and heads.
        attn: the attention.
        mlp_ratio: hidden channels of the MLP over dim.
        layer_scale: first value of the residual branches' factors.
        drop_path: stochastic depth of both branches.
        keep: share of the tokens that stay, (0, 1].
        prune_by: see `DependencyViT`.
    """

    def __init__(
        self, dim: int, attn: ReversedAttention, *, mlp_ratio: float, layer_scale: float, drop_path: float, keep: float, prune_by: str
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.keep, self.prune_by = keep, prune_by

    def forward(self, flow: Flow) -> Flow:
        sent, messages, received = self.attn(self.norm1(flow.tokens), flow.messages, self.keep < 1)
        flow = flow._replace(tokens=flow.tokens + self.drop_path(self.ls1(sent)), messages=messages)
        if received is not None:
            flow = self.prune(flow, self.score(received, messages))
        return flow._replace(tokens=flow.tokens + self.drop_path(self.ls2(self.mlp(self.norm2(flow.tokens)))))

    def score(self, received: Tensor, messages: Tensor) -> Tensor:
        """Who stays before whom, (B, n): the larger."""
        return received if self.prune_by == "received" else messages

    def prune(self, flow: Flow, score: Tensor) -> Flow:
        """The best tokens, in the order they stood in. Nothing is learned from the choice itself."""
        left = max(1, math.floor(self.keep * score.shape[1]))
        stay = descending_order(score.detach())[:, :left].sort(-1).values
        place = stay if flow.place is None else flow.place.gather(1, stay)
        return Flow(rows(flow.tokens, stay), flow.messages.gather(1, stay), place, flow.restored())


class ReadOut(nn.LayerNorm):
    """The last norm, and the tokens weighed by what they still send: Flow -> (B, N, C), whose plain mean over N is the image's feature.

    Weights are m over its mean ("weighted") or m itself ("mean"); tokens that left weigh nothing, those that stayed N / n times as much.
    """

    def __init__(self, dim: int, pool: str):
        super().__init__(dim, eps=EPS)
        self.weighted = pool == "weighted"

    def forward(self, flow: Flow) -> Tensor:  # type: ignore[override]
        weight = flow.messages
        if self.weighted:
            weight = weight / weight.mean(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        x = super().forward(flow.tokens)
        x = x * weight[..., None].to(x.dtype)
        if flow.place is None or flow.last is None:
            return x
        share = flow.last.shape[1] / x.shape[1]
        return torch.zeros_like(flow.last, dtype=x.dtype).scatter(1, over_channels(flow.place, x), share * x)
