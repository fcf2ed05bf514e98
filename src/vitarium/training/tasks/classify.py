"""Classification: one label per image."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.answers import NOT_FINITE, ranked_cells, ranked_flat
from vitarium.catalog.answers import class_names as names_of
from vitarium.catalog.calibration import calibrated, probabilities
from vitarium.training.tasks.base import (
    Batch,
    ConfusionData,
    GalleryData,
    GalleryImage,
    Metric,
    ReportSection,
    TableData,
    Task,
    match_classes,
)
from vitarium.training.tasks.registry import task

if TYPE_CHECKING:
    from vitarium.data import ImageData, ImageSet

WEAKEST = 5
"""Number of classes in the table of the lowest accuracies."""

TEXTS = {"accuracy": "accuracy", "top5": "accuracy, first five", "loss": "cross entropy", "calibration_error": "calibration error"}


ACCURACY = Metric("accuracy", "max", "%", share_of_images=True)
MISTAKES = 12
"""Number of the most confident mistakes that a comparison keeps."""


@task("classify")
class Classify(Task):
    """Assign one of the model's classes to an image.

    Target: int64 (), a class number. Model output: logits (B, num_classes).
    """

    result_kind = "labels"
    classifies = True

    @property
    def primary(self) -> Metric:
        return ACCURACY

    def match(self, model: nn.Module, data: ImageData) -> ImageData:
        """Renumber the data's classes by their names.

        Raises:
            DataError: a class that the model does not have.
        """
        return match_classes(model, data, lambda numbers: numbers.__getitem__)

    def metrics(self, model: nn.Module) -> Any:
        """Return accuracy and top5 (in [0, 1]), loss (cross entropy), calibration_error (15 bins), confusion_matrix (truth, prediction).

        Loss and calibration error are those of the model's `probabilities`, with the temperature of its calibration.
        """
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

        n = max(2, int(model.num_classes))  # type: ignore[arg-type]
        parts: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(n, average="micro", validate_args=False),
            "calibration_error": MulticlassCalibrationError(n, n_bins=15, validate_args=False),
            "confusion_matrix": MulticlassConfusionMatrix(n, validate_args=False),
        }
        if n > 5:
            parts["top5"] = MulticlassAccuracy(n, top_k=5, average="micro", validate_args=False)
        return nn.ModuleDict({"classes": MetricCollection(parts, compute_groups=False), "loss": MeanMetric(nan_strategy="disable")})

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        logits = calibrated(model, model(batch["image"]).float())
        metrics["classes"].update(logits, batch["target"])
        metrics["loss"].update(F.cross_entropy(logits, batch["target"], reduction="none"))

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        values = {"loss": metrics["loss"].compute(), **metrics["classes"].compute()}
        return {name: value.tolist() for name, value in values.items()}

    def report(self, values: dict[str, Any], data: ImageData) -> dict[str, Any]:
        """Add one row per class: name, images, accuracy (None without images)."""
        confusion = values["confusion_matrix"]
        rows = [
            {"name": name, "images": sum(row), "accuracy": row[i] / sum(row) if sum(row) else None}
            for i, (name, row) in enumerate(zip(data.classes, confusion, strict=False))
        ]
        plain = {name: value for name, value in values.items() if name != "confusion_matrix"}
        return {**plain, "classes": rows, "confusion_matrix": confusion}

    def texts(self, values: dict[str, Any]) -> dict[str, str]:
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        known = {}
        for name, text in TEXTS.items():
            if name in numbers:
                known[text] = f"{numbers[name]:.4f}" if name == "loss" else f"{100 * numbers[name]:.2f} %"
        return known | {name.replace("_", " "): f"{value:.4f}" for name, value in numbers.items() if name not in TEXTS}

    def tables(self, report: dict[str, Any]) -> list[TableData]:
        known = sorted((row for row in report["classes"] if row["accuracy"] is not None), key=lambda row: row["accuracy"])
        rows = [[row["name"], str(row["images"]), f"{100 * row['accuracy']:.1f} %"] for row in known[:WEAKEST]]
        return [TableData("Weakest classes", ["class", ">images", ">accuracy"], rows)] if len(known) > 1 else []

    def extras(self, model: Any, data: ImageData, values: dict[str, Any], *, batch_size: int = 64) -> dict[str, Any]:
        """Return accuracy and loss in double and full precision, `confusion` (rows true, columns predicted), and the most confident
        `mistakes`: index, image, true and predicted class, confidence."""
        from vitarium.training.evaluation import predict_logits

        logits, targets, indices = predict_logits(model, data.val, batch_size=batch_size)
        logits = calibrated(model, logits)
        return {
            "accuracy": (logits.argmax(1) == targets).double().mean().item(),
            "loss": F.cross_entropy(logits, targets).item(),
            "confusion": confusion_matrix(logits, targets),
            "mistakes": confident_mistakes(logits, targets, indices, data.val),
        }

    def sections(self, model: str, extras: dict[str, Any], classes: list[str]) -> list[ReportSection]:
        """The confusion matrix and the most confident mistakes."""
        matrix, mistakes = extras["confusion"], extras["mistakes"]
        total = sum(n for t, row in enumerate(matrix) for p, n in enumerate(row) if t != p)
        which = f"The {len(mistakes)} most confident of {total}" if total > len(mistakes) else "All of them, the most confident first"
        words = f"{which}: prediction with its probability, and the true class."
        images = [
            GalleryImage(
                index=m["index"],
                source=m["image"],
                answer=classes[m["predicted"]],
                note=f"{100 * m['confidence']:.0f} %",
                truth=f"is {classes[m['true']]}",
                description=f"An image of {classes[m['true']]} that was classified as {classes[m['predicted']]}",
            )
            for m in mistakes
        ]
        return [
            ConfusionData(f"What {model} confuses", confusion_words(matrix, classes), classes, matrix),
            GalleryData(
                "Its most confident mistakes", words if images else "There are none: every held-out image was classified correctly.", images
            ),
        ]

    def baseline(self, data: ImageData) -> dict[str, float]:
        """Return the accuracy of a constant prediction, the most frequent training class."""
        most = Counter(data.train.targets).most_common(1)[0][0]
        return {"accuracy": sum(target == most for target in data.val.targets) / max(1, len(data.val))}

    def answers(self, model: Any, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return {"predictions": [{"label", "probability"}, ...]}, the most probable first."""
        logits = model(batch["image"]).float()
        found = probabilities(model, logits).where(logits.isfinite(), torch.nan).cpu()
        return [ranked(row, class_names(model, row.shape[-1]), limit) for row in found]

    def cells(self, answer: dict[str, Any]) -> dict[str, str]:
        return ranked_cells(answer)

    def flat(self, answer: dict[str, Any]) -> dict[str, Any]:
        return ranked_flat(answer)


def ranked(shares: Tensor, names: list[str], limit: int) -> dict[str, Any]:
    """Return the classes of the largest probabilities (num_classes,), or {"error"} where these are not finite."""
    if not shares.isfinite().all():
        return dict(NOT_FINITE)
    largest, classes = (found.tolist() for found in shares.topk(min(limit, len(shares))))
    return {"predictions": [{"label": names[c], "probability": p} for c, p in zip(classes, largest, strict=True)]}


def class_names(model: Any, count: int) -> list[str]:
    """Return the model's labels, or "class 0", "class 1", ... if it has none."""
    return names_of(getattr(model, "labels", None), count)


def confusion_matrix(logits: Tensor, targets: Tensor) -> list[list[int]]:
    """Return counts (C, C), rows true, columns predicted. Logits (N, C), targets (N,)."""
    classes = logits.shape[1]
    return torch.bincount(targets * classes + logits.argmax(1), minlength=classes**2).view(classes, classes).tolist()


def confident_mistakes(logits: Tensor, targets: Tensor, indices: Tensor, images: ImageSet) -> list[dict[str, Any]]:
    """Return the wrong answers of highest probability, at most `MISTAKES`. Logits (N, C), targets and indices into `images` (N,)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = (predicted != targets).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    columns: list[list[Any]] = [t[chosen].tolist() for t in (indices, targets, predicted, confidence)]
    return [
        {"index": i, "image": images.describe(i), "true": true, "predicted": answer, "confidence": share}
        for i, true, answer, share in zip(*columns, strict=True)
    ]


def confusion_words(matrix: list[list[int]], classes: list[str]) -> str:
    """Return the number of errors and the most frequent confusion as a sentence."""
    wrong = [(n, t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) if t != p and n]
    if not wrong:
        return "Nothing: every held-out image was classified correctly."
    n, true, predicted = max(wrong, key=lambda entry: entry[0])
    total = sum(entry[0] for entry in wrong)
    seen = sum(map(sum, matrix))
    most = f"; most often {classes[true]} was taken for {classes[predicted]} ({n} of {sum(matrix[true])})" if n > 1 else ""
    return f"{total} of {seen} held-out images were classified wrongly{most}."
