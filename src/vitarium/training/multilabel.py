"""Learning several labels a picture, each a yes or a no: binary cross entropy, judged by the area under each label's ROC curve."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import DataError, UsageError
from vitarium.training.base import Batch, Learner
from vitarium.training.learners import learner

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe


@learner("multilabel")
class MultilabelLearner(Learner):
    """Image -> a yes or a no for each label.

    Targets are (B, labels) of 1, 0 and NaN; what is not known (NaN) neither teaches nor counts.

    Args:
        model: image (B, C, H, W) -> logits (B, num_classes); `num_classes` is its attribute.

    Raises:
        UsageError: the model has no classes.
    """

    data_task = "multilabel"
    default_data = "scenes"
    primary_metric = ("auroc", "max")

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__(model, settings)
        self.num_classes = int(getattr(model, "num_classes", 0))
        if self.num_classes < 1:
            raise UsageError(f"{type(model).__name__} has no labels to learn; create it with num_classes=N")

    @classmethod
    def create(cls, name: str, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None) -> Learner:
        if recipe.mixing.on:
            raise UsageError("pictures with several labels are not mixed: leave mixing out of the recipe")
        return super().create(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": binary_loss(self.model(batch["image"]), batch["target"])}

    @property
    def labels(self) -> list[str]:
        """Names of the labels."""
        return list(getattr(self.model, "labels", None) or [f"label {i}" for i in range(self.num_classes)])

    def metrics(self) -> Any:
        """See `summary`."""
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MultilabelAUROC, MultilabelAveragePrecision, MultilabelStatScores

        options: dict[str, Any] = dict(average=None, ignore_index=-1, validate_args=False)
        ranked: dict[str, Any] = {
            "auroc": MultilabelAUROC(self.num_classes, **options),
            "ap": MultilabelAveragePrecision(self.num_classes, **options),
        }
        counted = MultilabelStatScores(self.num_classes, **options)
        return nn.ModuleDict(
            {"ranked": MetricCollection(ranked, compute_groups=True), "counts": counted, "loss": MeanMetric(nan_strategy="disable")}
        )

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Targets: (B, num_classes).

        Raises:
            DataError: the data have other labels than the model.
        """
        logits, target = model(batch["image"]).float(), batch["target"]
        if logits.shape != target.shape:
            known = f"the model's {logits.shape[1]}: {', '.join(self.labels[:8])}"
            raise DataError(f"the data have {target.shape[-1]} labels a picture, other than {known}")
        known_or_not = target.nan_to_num(nan=-1).long()
        metrics["ranked"].update(logits.sigmoid(), known_or_not)
        metrics["counts"].update(logits.sigmoid(), known_or_not)
        metrics["loss"].update(binary_loss(logits, target))

    def summary(self, metrics: Any) -> dict[str, Any]:
        """auroc and mean_average_precision (0 to 1: means over the labels that some held-out pictures have and others lack), loss,
        auroc_NAME for each such label, and `findings`: a row a label."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns of labels that nobody has; here they are left out
            counts, values = metrics["counts"].compute().reshape(-1, 5).tolist(), metrics["ranked"].compute()
        rows = []
        for name, (tp, fp, tn, fn, _), auroc, ap in zip(self.labels, counts, values["auroc"].tolist(), values["ap"].tolist(), strict=True):
            both = tp + fn > 0 and fp + tn > 0
            row = {"name": name, "yes": tp + fn, "no": fp + tn}
            rows.append({**row, "auroc": auroc if both else None, "average_precision": ap if both else None})
        judged = [row for row in rows if row["auroc"] is not None]
        mean = lambda key: sum(row[key] for row in judged) / len(judged) if judged else float("nan")
        means = {"auroc": mean("auroc"), "mean_average_precision": mean("average_precision"), "loss": metrics["loss"].compute().item()}
        return {**means, **{f"auroc_{row['name']}": row["auroc"] for row in judged}, "findings": rows}

    def answers(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The probability of each label, the most probable first."""
        rows = model(batch["image"]).float().sigmoid().tolist()
        return [dict(sorted(zip(self.labels, row, strict=True), key=lambda pair: -pair[1])) for row in rows]


def binary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross entropy of logits (B, n) against targets (B, n) of 1 and 0; NaN is left out."""
    known = target.isfinite()
    losses = F.binary_cross_entropy_with_logits(logits, target.nan_to_num().to(logits.dtype), reduction="none")
    return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)
