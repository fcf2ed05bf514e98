"""Learning classes: cross entropy on hard, smoothed, mixed or given soft targets, or a yes or no a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import UsageError
from vitarium.training.base import Batch, Learner
from vitarium.training.building import build_model
from vitarium.training.learners import learner
from vitarium.training.recipe import Loss, Mixing, Recipe

if TYPE_CHECKING:
    from vitarium.data import ImageData


@learner("classification")
class ClassificationLearner(Learner):
    """Image -> class.

    A model that gives a pair of logits in training (a class token and a distillation token) is trained on the mean of both losses.

    Args:
        model: image (B, C, H, W) -> logits (B, num_classes); `num_classes` is its attribute.
        loss: cross entropy or binary, and label smoothing.
        mixing: Mixup and CutMix, drawn anew each batch from NumPy's global generator (which the loop sets by step).

    Raises:
        UsageError: the model has no classes.
    """

    primary_metric = ("accuracy", "max")

    def __init__(self, model: nn.Module, settings: Any = None, *, loss: Loss | None = None, mixing: Mixing | None = None):
        super().__init__(model, settings)
        self.num_classes = int(getattr(model, "num_classes", 0))
        if self.num_classes < 1:
            raise UsageError(f"{type(model).__name__} has no classes to learn; create it with num_classes=N")
        self.criterion_settings = loss or Loss()
        self.mixing = mixing or Mixing()
        self._mix: Any = None

    @classmethod
    def create(
        cls, name: str, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> ClassificationLearner:
        return cls.from_recipe(build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint), recipe)

    @classmethod
    def from_recipe(cls, model: nn.Module, recipe: Recipe) -> ClassificationLearner:
        """With the recipe's loss and mixing."""
        return cls(model, recipe.settings_of(cls), loss=recipe.loss, mixing=recipe.mixing)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Target: class numbers (B,) or soft targets (B, num_classes)."""
        image, target = batch["image"], batch["target"]
        if self.mixing.on and target.ndim == 1:
            image, target = self.mixed(image, target)
        logits = self.model(image)
        if isinstance(logits, tuple | list):
            losses = [self.criterion(each, target) for each in logits]
            return {"loss": torch.stack(losses).mean()}
        return {"loss": self.criterion(logits, target)}

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of logits (B, num_classes) against classes (B,) or shares (B, num_classes); mixed targets are smoothed already."""
        smoothing = self.criterion_settings.label_smoothing if target.ndim == 1 else 0.0
        if self.criterion_settings.name == "cross_entropy":
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        if target.ndim == 1:
            off = smoothing / self.num_classes
            target = torch.full_like(logits, off).scatter_(1, target[:, None], 1.0 - smoothing + off)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))

    def mixed(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and classes (B,) -> images and shares (B, num_classes). An odd last image stays as it is.

        The shares sum to 1; under the binary loss every class with a share is a yes instead, unsmoothed (DeiT-III).
        """
        from timm.data import Mixup
        from timm.data.mixup import mixup_target

        binary = self.criterion_settings.name == "binary"
        smoothing = 0.0 if binary else self.criterion_settings.label_smoothing
        if self._mix is None:
            m = self.mixing
            self._mix = Mixup(
                m.mixup,
                m.cutmix,
                None,
                m.probability,
                m.cutmix_probability,
                m.mode,
                label_smoothing=smoothing,
                num_classes=self.num_classes,
            )
        even = len(image) // 2 * 2
        shares = mixup_target(target, self.num_classes, smoothing=smoothing)
        if even:
            image = image.clone()  # timm mixes in place
            shares[:even] = self._mix(image[:even].flatten(1, -3), target[:even])[1]  # a clip's frames are mixed alike
        return image, shares.gt(0).to(shares.dtype) if binary else shares

    def metrics(self) -> Any:
        """accuracy and top5 (shares of 1), loss (cross entropy), calibration_error (15 bins), confusion_matrix (truth, prediction)."""
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

        n = max(2, self.num_classes)
        parts: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(n, average="micro", validate_args=False),
            "calibration_error": MulticlassCalibrationError(n, n_bins=15, validate_args=False),
            "confusion_matrix": MulticlassConfusionMatrix(n, validate_args=False),
        }
        if n > 5:
            parts["top5"] = MulticlassAccuracy(n, top_k=5, average="micro", validate_args=False)
        return nn.ModuleDict({"classes": MetricCollection(parts, compute_groups=False), "loss": MeanMetric(nan_strategy="disable")})

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Target: class numbers (B,)."""
        logits = model(batch["image"]).float()
        metrics["classes"].update(logits, batch["target"])
        metrics["loss"].update(F.cross_entropy(logits, batch["target"], reduction="none"))

    def summary(self, metrics: Any) -> dict[str, Any]:
        values = {"loss": metrics["loss"].compute(), **metrics["classes"].compute()}
        return {name: value.tolist() for name, value in values.items()}
