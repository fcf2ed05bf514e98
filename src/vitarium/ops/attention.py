"""Splitting channels into heads, and scaled dot-product attention on them.

Legend: B batch, N queries, M keys, C channels, h heads, d = C / h channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split channels into heads: (B, N, C) -> (B, h, N, d), a view."""
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


def split_packed_heads(x: Tensor, parts: int, num_heads: int) -> Tensor:
    """Split a joint projection such as [q | k | v] into parts and heads: (B, N, parts * C) -> (parts, B, h, N, d), a view."""
    head_dim = x.shape[2] // (parts * num_heads)
    return x.unflatten(2, (parts, num_heads, head_dim)).permute(2, 0, 3, 1, 4)


def merge_heads(x: Tensor) -> Tensor:
    """Concatenate the channels of the heads: (B, h, N, d) -> (B, N, C). The inverse of `split_heads`."""
    x = x.transpose(1, 2)
    if torch.compiler.is_exporting():  # the exported graph must not depend on the memory layout of the attention kernel's output
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


def multi_head_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute softmax(q k^T scale + bias) v in each head: (B, N, h d), (B, M, h d), (B, M, C) -> (B, N, C).

    Args:
        q, k, v: projected queries, keys and values; the width of a head may differ between values and queries.
        num_heads: heads h.
        bias: added to the logits, broadcastable to (B, h, N, M), in the dtype of q; or a bool mask, True where a key takes part.
        scale: factor on the logits, d ** -0.5 of the queries by default.
    """
    q, k, v = (split_heads(x, num_heads) for x in (q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale))
