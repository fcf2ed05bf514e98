"""Training with a budget of multiply-accumulates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vitarium.backbones.dit_routing.model import DiTRouting
from vitarium.errors import UsageError
from vitarium.training.base import Batch
from vitarium.training.classification import ClassificationLearner
from vitarium.training.learners import learner

if TYPE_CHECKING:
    from PIL import Image


@learner("dit_routing", task="classify")
class RoutingLearner(ClassificationLearner):
    """Classification with a cost budget. Evaluation reports `cost`, the mean cost relative to all gates on.

    Raises:
        UsageError: the model is not a `DiTRouting`.
    """

    class Settings(ClassificationLearner.Settings):
        """Settings of classification, and of the budget term.

        Args:
            weight: of the budget term.
            hinge: penalise only a cost above the target.
            warmup: share of the training in which the target falls from 1 to the model's `budget`.
            temperatures: of the Gumbel-softmax at the start and at the end, with geometric interpolation.
        """

        weight: Annotated[float, Field(ge=0)] = 1.0
        hinge: bool = False
        warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
        temperatures: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (5.0, 0.5)

    settings: Settings
    model: DiTRouting

    def __init__(self, model: nn.Module, settings: Any = None, **options: Any):
        if not isinstance(model, DiTRouting):
            raise UsageError(f"the objective dit_routing trains models with routes (dit_routing_*), got {type(model).__name__}")
        super().__init__(model, settings, **options)
        self.target = model.budget

    def before_step(self, step: int, total_steps: int) -> None:
        super().before_step(step, total_steps)
        done, (first, last) = step / max(1, total_steps - 1), self.settings.temperatures
        self.model.temperature.fill_(first * (last / first) ** done)
        fallen = 1.0 if self.settings.warmup == 0 else min(1.0, done / self.settings.warmup)
        self.target = 1 + (self.model.budget - 1) * fallen

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        with self.model.watch() as routes:
            losses = super().loss(batch)
        share = self.model.share(routes).mean()
        return {"loss": losses["loss"] + self.settings.weight * self.over_budget(share), "cost": share.detach()}

    def over_budget(self, share: Tensor) -> Tensor:
        """Return the unweighted budget term of a relative cost."""
        excess = share - self.target
        return (excess.clamp(min=0) if self.settings.hinge else excess).square()

    def metrics(self) -> Any:
        """Return the metrics of classification and `cost`."""
        from torchmetrics import MeanMetric

        metrics = super().metrics()
        metrics["cost"] = MeanMetric(nan_strategy="disable")
        return metrics

    def evaluate_batch(self, model: Any, batch: Batch, metrics: Any) -> None:
        with model.watch() as routes:
            super().evaluate_batch(model, batch, metrics)
        metrics["cost"].update(model.share(routes))

    def summary(self, metrics: Any) -> dict[str, Any]:
        return super().summary(metrics) | {"cost": metrics["cost"].compute().item()}

    def pictures(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw the first images of a batch and below each its depth map: dark for few blocks, bright for many."""
        from PIL import Image

        from vitarium.catalog.create import preprocessing_of

        image, preparation = batch["image"][:6], preprocessing_of(model)
        if not len(image):
            return {}
        mean, std = (image.new_tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
        depth = model.depth_map(image)[:, None].expand(-1, 3, -1, -1)
        most = sum(len(edge.blocks) for row in model.stages for edge in row)
        rows = [torch.cat(list((image * std + mean).expand(-1, 3, -1, -1)), 2), torch.cat(list(depth / most), 2)]
        pixels = torch.cat(rows, 1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        shown, larger = Image.fromarray(pixels), max(1, 96 // image.shape[2])
        return {"depth": shown.resize((larger * shown.width, larger * shown.height), Image.Resampling.NEAREST)}
