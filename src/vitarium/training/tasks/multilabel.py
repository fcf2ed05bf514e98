"""Multi-label classification: an independent binary decision for each label."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.answers import decided
from vitarium.errors import DataError
from vitarium.training.tasks.base import Batch, Metric, TableData, Task, match_classes
from vitarium.training.tasks.classify import class_names
from vitarium.training.tasks.registry import task

if TYPE_CHECKING:
    from vitarium.data import ImageData


@task("multilabel")
class Multilabel(Task):
    """Decide for each label whether an image has it.

    Target: float32 (labels,) of 1, 0 and NaN (unknown: neither trained nor measured). Model output: logits (B, labels).
    """

    data_kind = "multilabel"
    default_data = "scenes"
    result_kind = "labels"

    @property
    def primary(self) -> Metric:
        return Metric("auroc", "max", title="AUROC")

    def match(self, model: Any, data: ImageData) -> ImageData:
        """Reorder the data's labels by their names. Labels that the data lacks become unknown.

        Raises:
            DataError: a label that the model does not have.
        """

        def renumber(numbers: list[int]) -> Callable[[Any], Any]:
            def change(target: Any) -> Any:
                row = np.full(len(model.labels), np.nan, np.float32)
                row[numbers] = target
                return row

            return change

        return match_classes(model, data, renumber)

    def metrics(self, model: Any) -> Any:
        """Return the metrics of `summary`."""
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MultilabelAUROC, MultilabelAveragePrecision, MultilabelStatScores

        count = int(model.num_classes)
        options: dict[str, Any] = dict(average=None, ignore_index=-1, validate_args=False)
        ranked: dict[str, Any] = {"auroc": MultilabelAUROC(count, **options), "ap": MultilabelAveragePrecision(count, **options)}
        counted = MultilabelStatScores(count, **options)
        return nn.ModuleDict(
            {"ranked": MetricCollection(ranked, compute_groups=True), "counts": counted, "loss": MeanMetric(nan_strategy="disable")}
        )

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Add a batch. Targets: (B, num_classes).

        Raises:
            DataError: the data has another number of labels than the model.
        """
        logits, target = model(batch["image"]).float(), batch["target"]
        if logits.shape != target.shape:
            known = ", ".join(class_names(model, logits.shape[1])[:8])
            raise DataError(f"the data has {target.shape[-1]} labels per image, the model has {logits.shape[1]}: {known}")
        known_or_not = target.nan_to_num(nan=-1).long()
        metrics["ranked"].update(logits.sigmoid(), known_or_not)
        metrics["counts"].update(logits.sigmoid(), known_or_not)
        metrics["loss"].update(binary_loss(logits, target))

    def summary(self, metrics: Any, model: Any) -> dict[str, Any]:
        """Return auroc and mean_average_precision (0 to 1; means over labels with positive and negative held-out images), loss,
        auroc_NAME for each such label, and `findings`, one row per label."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns of labels without positives; they are left out here
            counts, values = metrics["counts"].compute().reshape(-1, 5).tolist(), metrics["ranked"].compute()
        rows, names = [], class_names(model, len(counts))
        for name, (tp, fp, tn, fn, _), auroc, ap in zip(names, counts, values["auroc"].tolist(), values["ap"].tolist(), strict=True):
            both = tp + fn > 0 and fp + tn > 0
            row = {"name": name, "yes": tp + fn, "no": fp + tn}
            rows.append({**row, "auroc": auroc if both else None, "average_precision": ap if both else None})
        judged = [row for row in rows if row["auroc"] is not None]
        mean = lambda key: sum(row[key] for row in judged) / len(judged) if judged else float("nan")
        means = {"auroc": mean("auroc"), "mean_average_precision": mean("average_precision"), "loss": metrics["loss"].compute().item()}
        return {**means, **{f"auroc_{row['name']}": row["auroc"] for row in judged}, "findings": rows}

    def texts(self, values: dict[str, Any]) -> dict[str, str]:
        """Return the means only; the values of each label are in the table."""
        single = {f"auroc_{row['name']}" for row in values.get("findings", [])}
        return super().texts({name: value for name, value in values.items() if name not in single})

    def tables(self, report: dict[str, Any]) -> list[TableData]:
        cell = lambda value: "" if value is None else f"{value:.4f}"
        rows = [[r["name"], str(r["yes"]), str(r["no"]), cell(r["auroc"]), cell(r["average_precision"])] for r in report["findings"]]
        return [TableData("Labels", ["label", ">yes", ">no", ">AUROC", ">average precision"], rows)]

    def baseline(self, data: ImageData) -> dict[str, float]:
        """Return the area under the ROC curve of a constant prediction."""
        return {"auroc": 0.5}

    def answers(self, model: Any, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return the probability of each label, the most probable first; {"error"} where the outputs are not finite."""
        rows = model(batch["image"]).float().detach().cpu().numpy()
        return [decided(row, class_names(model, len(row)), limit) for row in rows]


def binary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean binary cross entropy of logits (B, n) against targets (B, n) of 1 and 0; NaN targets are left out."""
    known = target.isfinite()
    losses = F.binary_cross_entropy_with_logits(logits, target.nan_to_num().to(logits.dtype), reduction="none")
    return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)
