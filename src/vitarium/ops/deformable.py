"""Multi-scale deformable attention: each query samples a few locations of several maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def deformable_attention(value: Tensor, shapes: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of bilinear samples; locations outside the maps are zero.

    Notation: B batch, N cells of all L maps, h heads, d channels per head, Q queries, P locations per map.

    Args:
        value: (B, N, h, d), the cells of all maps, one map after the other, each row by row.
        shapes: height and width of each map; the products sum to N.
        places: (B, Q, h, L, P, 2), x and y relative to the map: 0 is its left or upper edge, 1 its right or lower edge.
        weights: (B, Q, h, L, P).

    Returns:
        (B, Q, h d).

    Raises:
        ValueError: the shapes do not add up to N cells.

    Source: Zhu et al., "Deformable DETR", 2021; equal to its CUDA kernel.
    """
    b, cells, heads, dim = value.shape
    if sum(h * w for h, w in shapes) != cells:
        raise ValueError(f"maps of shapes {list(shapes)} have {sum(h * w for h, w in shapes)} cells, value has {cells}")
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B h, Q, L, P, 2)
    shares = weights.transpose(1, 2).flatten(0, 1)  # (B h, Q, L, P)
    total: Tensor | None = None
    for level, ((h, w), part) in enumerate(zip(shapes, value.split([h * w for h, w in shapes], 1), strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(b * heads, dim, h, w)
        sampled = F.grid_sample(maps, grid[:, :, level], align_corners=False)  # (B h, d, Q, P)
        seen = torch.einsum("ndqp,nqp->nqd", sampled, shares[:, :, level])
        total = seen if total is None else total + seen
    assert total is not None
    return total.unflatten(0, (b, heads)).transpose(1, 2).flatten(2)
