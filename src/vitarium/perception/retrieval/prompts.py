"""Deep visual prompts, learned tokens in the attention of a plain vision transformer, and an embedding head with unit vectors.

A block with P prompts runs on [prompts | tokens], and discards its outputs at the prompts. The prompts therefore act only as P more keys
and values of the attention,

    heads = softmax(q [k_p | k]^T scale) [v_p | v],      k_p, v_p = keys and values of norm1(prompts)

which is computed here directly: there are no queries and no MLP for the prompts, and token reductions do not process them. Prompts have no
position, and rotary models do not rotate them.

Notation: B batch, P prompts per block, N tokens, C channels, E length of an embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.anatomy import Anatomy, Attended, BlockView, Site


class VisualPrompts(nn.Module):
    """Prompts of the first blocks, (1, P, C) each, shared by all images.

    Args:
        dim: channels C.
        count: prompts per block, P.
        depth: number of blocks with prompts.
        patch: number of values of an image patch, for the initialisation (VPT's: uniform within sqrt(6 / (patch + C))).
    """

    trained_part = True

    def __init__(self, dim: int, count: int, depth: int, patch: int = 768):
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(1, count, dim)) for _ in range(depth if count else 0))
        for prompts in self.layers:
            nn.init.uniform_(prompts, -math.sqrt(6 / (patch + dim)), math.sqrt(6 / (patch + dim)))
        self._given: Sequence[Tensor] | None = None

    def of(self, block: int) -> Tensor | None:
        """Return the prompts of a block, (1 or B, P, C), or None if it has none."""
        layers: Sequence[Tensor] = self.layers if self._given is None else self._given  # type: ignore[assignment]
        return layers[block] if block < len(layers) else None

    @contextlib.contextmanager
    def instead(self, given: Sequence[Tensor]) -> Iterator[None]:
        """Use other prompts within the context: one tensor (B, P, C) per block, for as many of the first blocks as are given."""
        before, self._given = self._given, given
        try:
            yield
        finally:
            self._given = before


class PromptSite(Site):
    """Prompts in the attention of one block."""

    def __init__(self, prompts: VisualPrompts, view: BlockView, block: int):
        self.prompts, self.view, self.block = prompts, view, block

    def attend(self, attended: Attended) -> Tensor | None:
        prompts = self.prompts.of(self.block)
        if prompts is None:
            return None
        attention = self.view.attention
        _, k, v = attention.qkv(self.view.norm1(prompts))
        size = (len(attended.k), -1, -1, -1)
        k, v = (attention.repeat_kv(t).to(attended.v.dtype).expand(size) for t in (k, v))
        bias = None if attended.bias is None else F.pad(attended.bias, (k.shape[2], 0))
        return F.scaled_dot_product_attention(
            attended.q,
            torch.cat((k, attended.k), dim=2),
            torch.cat((v, attended.v), dim=2),
            attn_mask=bias,
            dropout_p=attention.dropout,
            scale=attended.scale,
        )


class EmbeddingHead(nn.Module):
    """Embedding head: pooled features (B, C) -> unit vectors (B, E), normalise(Linear(LayerNorm(x))). It replaces the classifier."""

    trained_part = True

    def __init__(self, in_features: int, embed_dim: int):
        super().__init__()
        self.in_features, self.embed_dim = in_features, embed_dim
        self.norm = nn.LayerNorm(in_features)
        self.proj = nn.Linear(in_features, embed_dim)
        self._features = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self._features else F.normalize(self.proj(self.norm(x)), dim=-1)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Return the pooled features (B, C) themselves within the context."""
        before, self._features = self._features, True
        try:
            yield
        finally:
            self._features = before


def freeze(model: nn.Module, head: nn.Module | None) -> tuple[str, ...]:
    """Freeze a model except the parameters that methods added and its head. Returns the names of parameters that were trainable."""
    added = (child for module in model.modules() if getattr(module, "trained_part", False) for child in module.children())
    spared = {id(p) for child in added for p in child.parameters()}
    spared |= {id(p) for p in (head.parameters() if head is not None else ())}
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad and id(p) not in spared)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


def head_width(view: Anatomy) -> int:
    """Return the number of input features of a model's head."""
    width = getattr(view.head, "in_features", None) or getattr(view.tower, "num_features", None)
    return int(width or view.blocks[0].norm1.weight.shape[0])  # type: ignore[union-attr, arg-type, index]
