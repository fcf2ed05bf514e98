"""Scores of embeddings for retrieving images of the same class: recall@k and MAP@R, each image against all others.

For a query image q with R other images of its class, and all others ranked by cosine similarity:

    recall@k = 1 if one of the first k has q's class
    MAP@R    = 1/R sum_{i <= R} P(i) rel(i),   P(i): share of q's class among the first i, rel(i): whether the i-th has it

averaged over the images whose class has another image (Musgrave et al. 2020). An image is never its own neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RANKS = (1, 2, 4, 8)
ROWS = 1024
"""Number of images that are compared with all others at once."""


def retrieval_scores(embeddings: Tensor, targets: Tensor, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Return recall_at_k for each rank, and map_at_r, in [0, 1]; all are 0 where no class has two images.

    Args:
        embeddings: (N, E), compared by their dot products (cosines of unit vectors).
        targets: classes (N,).
    """
    _, place, counts = targets.unique(return_inverse=True, return_counts=True)
    others = counts[place] - 1  # R of each image
    width = min(len(targets) - 1, max(int(others.max()), *ranks)) if len(targets) else 0
    sums: dict[str, Any] = dict.fromkeys((*(f"recall_at_{k}" for k in ranks), "map_at_r"), 0.0)
    position = torch.arange(1, width + 1, device=embeddings.device)
    for start in range(0, len(targets) if width else 0, ROWS):
        rows = torch.arange(start, min(start + ROWS, len(targets)), device=embeddings.device)
        similarity = embeddings[rows] @ embeddings.mT
        similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        nearest = similarity.topk(width, dim=1).indices
        r = others[rows]
        hit = (targets[nearest] == targets[rows, None]) & (r > 0)[:, None]
        for k in ranks:
            sums[f"recall_at_{k}"] += hit[:, :k].any(1).sum()
        precision = hit.cumsum(1) / position * (hit & (position <= r[:, None]))
        sums["map_at_r"] += (precision.sum(1) / r.clamp(min=1)).sum()
    counted = max(1, int((others > 0).sum()))
    return {name: float(value) / counted for name, value in sums.items()}
