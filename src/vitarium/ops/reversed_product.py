"""Reversed attention: each query distributes its value by its softmax over the keys, and each key sums what it receives.

Fused attention kernels normalise over the summed axis and cannot compute it: the matrix is transposed between softmax and product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitarium.ops.linear import only_for_values

PIECE_BYTES = {"cpu": 2**19}
"""Bytes of attention weights that are computed at once in plain inference; on a CPU they fit a core's cache."""
PIECE_ELSEWHERE = 2**28


def reversed_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum_i softmax_j(q_i k_j) v_i: queries and keys (B, H, N, d), values (B, H, N, e) -> what each token receives, (B, H, N, e)."""
    if not only_for_values(q, k, v):
        return (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v
    count, cells = q.shape[-2], PIECE_BYTES.get(q.device.type, PIECE_ELSEWHERE) // q.element_size()
    heads = max(1, cells // count**2)
    senders = max(1, min(count, cells // count))
    received = torch.zeros_like(v, memory_format=torch.contiguous_format).flatten(0, 1)
    parts = zip(*(t.flatten(0, 1).split(heads) for t in (q, k, v)), received.split(heads), strict=True)
    for some_q, some_k, some_v, out in parts:
        for of, sent in zip(some_q.split(senders, 1), some_v.split(senders, 1), strict=True):
            weights = torch.bmm(of, some_k.mT).softmax(-1)
            out += torch.bmm(weights.mT.to(sent.dtype), sent)
    return received.view(v.shape)
