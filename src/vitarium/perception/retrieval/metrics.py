"""Retrieval scores as a torchmetrics metric. Importing this module imports torchmetrics; the scores alone are in `scores.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vitarium.perception.retrieval.scores import RANKS, retrieval_scores


class RetrievalMetric(Metric):
    """`retrieval_scores` over all batches and all processes."""

    full_state_update = False
    embeddings: list[Tensor]
    targets: list[Tensor]

    def __init__(self, ranks: Sequence[int] = RANKS, **options: Any):
        super().__init__(**options)
        self.ranks = tuple(ranks)
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, targets: Tensor) -> None:
        """Add a batch of unit vectors (B, E) and classes (B,)."""
        self.embeddings.append(embeddings.detach().float())
        self.targets.append(targets)

    def compute(self) -> dict[str, float]:
        """Return `retrieval_scores` of everything added so far."""
        return retrieval_scores(dim_zero_cat(self.embeddings), dim_zero_cat(self.targets), self.ranks)
