"""Blocks of DependencyViT, the state that is passed between them, and the final norm.

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
"""Epsilon of every norm."""


class Flow(NamedTuple):
    """State that is passed from block to block."""

    tokens: Tensor
    """(B, n, C)"""
    messages: Tensor
    """m, (B, n)"""
    place: Tensor | None = None
    """(B, n) int64, patch index of each token; None while no token is pruned."""
    last: Tensor | None = None
    """(B, N, C) value of every token at the last pruning."""

    def restored(self) -> Tensor:
        """Return all tokens, (B, N, C); pruned tokens have the value with which they were pruned."""
        if self.place is None or self.last is None:
            return self.tokens
        return self.last.scatter(1, over_channels(self.place, self.tokens), self.tokens)


def start(tokens: Tensor) -> Flow:
    """Return the initial state of tokens (B, N, C): none pruned, all messages 1."""
    return Flow(tokens, precise(torch.ones_like(tokens[..., 0])))


def over_channels(place: Tensor, tokens: Tensor) -> Tensor:
    """Expand indices (B, n) over the channels of tokens, (B, n, C)."""
    return place[..., None].expand(-1, -1, tokens.shape[-1])


class DependencyBlock(nn.Module):
    """Block of reversed attention, optional pruning, and MLP: Flow -> Flow.

    Args:
        dim: channels.
        attn: the attention.
        mlp_ratio: ratio of the MLP's hidden channels to dim.
        layer_scale: initial value of the layer scales.
        drop_path: stochastic depth rate of both branches.
        keep: share of the tokens that are kept, (0, 1].
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
        """Return the pruning score (B, n); the highest are kept."""
        return received if self.prune_by == "received" else messages

    def prune(self, flow: Flow, score: Tensor) -> Flow:
        """Keep the tokens with the highest scores, in their order. The selection has no gradient."""
        left = max(1, math.floor(self.keep * score.shape[1]))
        stay = descending_order(score.detach())[:, :left].sort(-1).values
        place = stay if flow.place is None else flow.place.gather(1, stay)
        return Flow(rows(flow.tokens, stay), flow.messages.gather(1, stay), place, flow.restored())


class ReadOut(nn.LayerNorm):
    """Final norm and weighting of the tokens by their messages: Flow -> (B, N, C), whose mean over N is the image feature.

    The weights are m divided by its mean ("weighted") or m itself ("mean"); pruned tokens have weight 0, the others are scaled by N / n.
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
