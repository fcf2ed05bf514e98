"""Multi-label classification by binary cross entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitarium.errors import UsageError
from vitarium.training.base import Batch, Learner
from vitarium.training.learners import learner
from vitarium.training.tasks.multilabel import binary_loss


@learner("multilabel", task="multilabel")
class MultilabelLearner(Learner):
    """Train a classifier with an independent binary decision for each label.

    Targets are (B, labels) of 1, 0 and NaN; unknown ones (NaN) are left out of the loss.

    Args:
        model: image (B, C, H, W) -> logits (B, num_classes); `num_classes` is its attribute.

    Raises:
        UsageError: the model has no classes.
    """

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__(model, settings)
        self.num_classes = int(getattr(model, "num_classes", 0))
        if self.num_classes < 1:
            raise UsageError(f"{type(model).__name__} has no labels to learn; create it with num_classes=N")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": binary_loss(self.model(batch["image"]), batch["target"])}
