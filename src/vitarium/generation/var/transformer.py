"""VAR's transformer: predicts all codes of the next scale at once, from the sum of the earlier scales.

    x  <- x + g1 Attn(LN(x) (1 + s1) + b1)        q and k of length 1 (an option), logits scaled by a learned exp(s) per head
    x  <- x + g2 MLP(LN(x) (1 + s2) + b2)         (g1, g2, s1, s2, b1, b2) from the class

A token attends to its own scale and all before it. Sampling needs no mask: a scale attends to the cache of those before it.

Notation: B batch, L tokens of all scales, C channels of the codes, D embed_dim, h heads, d = D / h, V codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import DropPath, Linear, Mlp, drop_path_rates, init_weights
from vitarium.ops.attention import merge_heads, split_packed_heads

MAX_LOG_SCALE = math.log(100)


class Cache:
    """Cache of keys and values, allocated once: for each block a (2, B, h, L, d)."""

    def __init__(self, depth: int, batch: int, num_heads: int, length: int, head_dim: int, like: Tensor):
        self.store = like.new_empty(depth, 2, batch, num_heads, length, head_dim)
        self.length = 0
        """Number of tokens that all blocks have processed."""

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, h, n, d) of n tokens; return those of all tokens, (B, h, length + n, d)."""
        end = self.length + keys.shape[2]
        stored = self.store[block]
        stored[0, :, :, self.length : end] = keys
        stored[1, :, :, self.length : end] = values
        return stored[0, :, :, :end], stored[1, :, :, :end]


class PlainAttention(nn.Module):
    """Attention with logits q k^T / (4 sqrt(d)), as in the authors' code: (B, n, D) -> the same shape. The keys' bias is fixed at zero."""

    k_bias: Tensor

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, 0.25 / math.sqrt(dim // num_heads)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, h, n, d) as they enter the product."""
        return q, k

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, block: int) -> Tensor:
        qkv = self.qkv(x) + torch.cat([self.q_bias, self.k_bias, self.v_bias])
        q, k, v = split_packed_heads(qkv, 3, self.num_heads)
        q, k = self.compared(q, k)
        if cache is not None:
            k, v = cache.extend(block, k, v)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)))


class CosineAttention(PlainAttention):
    """Attention by the angle of queries and keys, times a learned scale of each head, at most 100."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.scale = 1.0
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, dim=-1) * self.log_scale.clamp(max=MAX_LOG_SCALE).exp(), F.normalize(k, dim=-1)


class Block(nn.Module):
    """Block modulated by (B, 1, 6, D): (B, n, D) -> the same shape. With `shared` the model has the class layer, and the block only a
    table."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, shared: bool, cosine: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)  # before attention and before the MLP
        self.attn = CosineAttention(dim, num_heads) if cosine else PlainAttention(dim, num_heads)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), functools.partial(nn.GELU, approximate="tanh"))  # type: ignore[arg-type]
        self.drop_path = DropPath(drop_path)
        if shared:
            self.ada_table = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)
        else:
            self.ada = Linear(dim, 6 * dim)

    def modulation(self, given: Tensor) -> Tensor:
        """Return the modulation from SiLU(class) (B, D), or from the shared layer's output (B, 1, 6, D)."""
        return self.ada(given).unflatten(-1, (6, -1))[:, None] if given.ndim == 2 else self.ada_table + given

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor | None, cache: Cache | None, block: int) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = x + self.drop_path(self.attn(torch.addcmul(shift1, self.norm(x), 1 + scale1), mask, cache, block) * gate1)
        return x + self.drop_path(self.mlp(torch.addcmul(shift2, self.norm(x), 1 + scale2)) * gate2)


class ScaleTransformer(nn.Module):
    """Next-scale transformer: inputs of earlier scales (B, L - first, C) and a class (B,) -> logits of all codes (B, L, V).

    Args:
        lengths: number of tokens of each scale; lengths of 1 make it an ordinary autoregressive transformer.
        code_dim: channels C of its input.
        vocab_size: number of codes V.
        num_classes: number of classes; the number after the last is the null class.
        embed_dim, depth, num_heads, mlp_ratio: sizes.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        shared_modulation: whether one linear layer of the class serves all blocks, with a table in each.
        cosine_attention: whether attention compares queries and keys by their angle, as all released models; False: by their product.
        init_gate: factor on the initial gates of the branches.
    """

    levels: Tensor
    """Scale of each token, (L,)."""

    def __init__(
        self,
        lengths: Sequence[int],
        code_dim: int,
        vocab_size: int,
        num_classes: int,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        shared_modulation: bool = False,
        cosine_attention: bool = True,
        init_gate: float = 1e-3,
    ):
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        super().__init__()
        self.lengths, self.num_classes, self.num_heads = tuple(lengths), num_classes, num_heads
        self.word_embed = Linear(code_dim, embed_dim)
        self.class_embed = nn.Embedding(num_classes + 1, embed_dim)
        self.start = nn.Parameter(torch.empty(1, lengths[0], embed_dim))
        self.positions = nn.Parameter(torch.empty(1, sum(lengths), embed_dim))
        self.level_embed = nn.Embedding(len(lengths), embed_dim)
        self.shared_ada = Linear(embed_dim, 6 * embed_dim) if shared_modulation else None
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, shared_modulation, cosine_attention) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, elementwise_affine=False)
        self.head_ada = Linear(embed_dim, 2 * embed_dim)
        self.head = Linear(embed_dim, vocab_size)
        levels = torch.cat([torch.full((length,), k) for k, length in enumerate(lengths)])
        self.register_buffer("levels", levels, persistent=False)
        self.init_weights(init_gate)

    def init_weights(self, gate: float = 1e-3) -> None:
        """Initialise as the authors; `gate` is the factor on the gates of the branches (smaller in their deeper models)."""
        dim, depth = self.head.in_features, len(self.blocks)
        std = (1 / dim / 3) ** 0.5
        init_weights(self, std=std)
        for table in (self.class_embed, self.level_embed):
            nn.init.trunc_normal_(table.weight, std=std)
        with torch.no_grad():
            for parameter in (self.start, self.positions):
                nn.init.trunc_normal_(parameter, std=std)
            self.head.weight.mul_(0.02)
            self.head_ada.weight.mul_(0.5)
            block: Any
            for block in self.blocks:
                block.attn.proj.weight.div_((2 * depth) ** 0.5)
                block.mlp.fc2.weight.div_((2 * depth) ** 0.5)
                rows = block.ada.weight.view(6, dim, dim) if self.shared_ada is None else block.ada_table[0, 0]
                rows[:2].mul_(gate)
                rows[2:].mul_(0.5)

    def forward(self, views: Tensor, labels: Tensor) -> Tensor:
        condition = self.class_embed(labels)
        x = torch.cat([self.first(condition), self.word_embed(views)], 1) + self.places()
        return self.logits(self.run(x, self.modulations(condition), self.mask()), condition)

    def first(self, condition: Tensor) -> Tensor:
        """Return the tokens of the first scale, from the class (B, D), without positions: (B, first, D)."""
        return condition[:, None] + self.start

    def places(self) -> Tensor:
        """Return the position encoding, (1, L, D)."""
        return self.level_embed(self.levels) + self.positions

    def mask(self) -> Tensor:
        """Return the mask (L, L), True where the row's token attends to the column's."""
        return self.levels[:, None] >= self.levels

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """Return each block's modulation, from the class (B, D): (B, 1, 6, D)."""
        given = F.silu(condition)
        if self.shared_ada is not None:
            given = self.shared_ada(given).unflatten(-1, (6, -1))[:, None]
        blocks: Iterable[Any] = self.blocks
        return [block.modulation(given) for block in blocks]

    def run(self, x: Tensor, modulations: Sequence[Tensor], mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Apply the blocks to tokens (B, n, D); with a cache the tokens also attend to cached ones, and are appended to it."""
        for i, block in enumerate(self.blocks):
            x = block(x, modulations[i], mask, cache, i)
        if cache is not None:
            cache.length += x.shape[1]
        return x

    def logits(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return logits (B, n, V) from tokens (B, n, D) and class (B, D)."""
        scale, shift = self.head_ada(F.silu(condition))[:, None].chunk(2, -1)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


class Steps:
    """Scale-by-scale decoding: `steps.next(view)` returns the logits of the next scale.

    Args:
        transformer: in eval mode.
        labels: (B,).
        cached: whether keys and values are cached. False recomputes all scales each time, with the same logits, for comparison.
    """

    def __init__(self, transformer: ScaleTransformer, labels: Tensor, cached: bool = True):
        self.transformer, self.scale = transformer, 0
        self.condition = transformer.class_embed(labels)
        self.modulations = transformer.modulations(self.condition)
        self.places = transformer.places()
        self.seen = self.condition.new_empty(len(labels), 0, self.condition.shape[1])
        """Tokens of all scales so far if there is no cache, (B, n, D)."""
        self.cache = None
        if cached:
            heads, dim = transformer.num_heads, self.condition.shape[1]
            depth, length = len(transformer.blocks), len(transformer.levels)
            self.cache = Cache(depth, len(labels), heads, length, dim // heads, self.condition)

    def next(self, view: Tensor | None) -> Tensor:
        """Return the next scale's logits (B, p_k^2, V) from its input (B, p_k^2, C) (None for the first)."""
        t, count = self.transformer, self.transformer.lengths[self.scale]
        begin = sum(t.lengths[: self.scale])
        x = (t.first(self.condition) if view is None else t.word_embed(view)) + self.places[:, begin : begin + count]
        self.scale += 1
        if self.cache is not None:
            return t.logits(t.run(x, self.modulations, cache=self.cache), self.condition)
        self.seen = torch.cat([self.seen, x], 1)
        mask = t.mask()[: begin + count, : begin + count]
        return t.logits(t.run(self.seen, self.modulations, mask)[:, begin:], self.condition)
