"""How good embeddings are for finding pictures of the same class: recall@k and MAP@R, each picture against all others.

Of a picture q with R others of its class, and the others ranked by cosine:

    recall@k = 1 if one of the first k is of its class
    MAP@R    = 1/R sum_{i <= R} P(i) rel(i),   P(i): share of q's class among the first i, rel(i): whether the i-th is of it

averaged over the pictures that have an other of their class (Musgrave et al. 2020). A picture is never its own neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RANKS = (1, 2, 4, 8)
ROWS = 1024
"""Pictures that are compared with all others at once."""


def retrieval_scores(embeddings: Tensor, targets: Tensor, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """recall_at_k for each rank, and map_at_r, shares of 1; all 0 where no picture has an other of its class.

    Args:
        embeddings: (N, E), compared by their dot products (cosines of unit vectors).
        targets: classes (N,).
    """
    _, place, counts = targets.unique(return_inverse=True, return_counts=True)
    others = counts[place] - 1  # R of each picture
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


class RetrievalMetric(Metric):
    """`retrieval_scores` of all batches together; it adds up over processes."""

    full_state_update = False
    embeddings: list[Tensor]
    targets: list[Tensor]

    def __init__(self, ranks: Sequence[int] = RANKS, **options: Any):
        super().__init__(**options)
        self.ranks = tuple(ranks)
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, targets: Tensor) -> None:
        """A batch of unit vectors (B, E) and classes (B,)."""
        self.embeddings.append(embeddings.detach().float())
        self.targets.append(targets)

    def compute(self) -> dict[str, float]:
        """See `retrieval_scores`."""
        return retrieval_scores(dim_zero_cat(self.embeddings), dim_zero_cat(self.targets), self.ranks)
