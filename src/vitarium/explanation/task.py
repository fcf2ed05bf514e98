"""Explanation: a label and a map of the evidence for it, for models with built-in explanations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitarium.errors import InputError
from vitarium.training.tasks import Metric, Task, task
from vitarium.training.tasks.base import Batch

if TYPE_CHECKING:
    from PIL import Image


@task("explain")
class Explain(Task):
    """Map the evidence in an image for a classifier's own prediction. Labels of the data are not used.

    The model has `own_maps`: images (B, C, H, W) -> maps (B, H, W) in [0, 1], predicted classes (B,) and probabilities (B,).
    Metrics, in percent: average drop (lower is better) and increase in confidence of the class when only the largest 100, 50 or 15 % of its
    map are kept.
    """

    data_kind = "image"
    usage = "vitarium explain IMAGE --model {file} --method t_tame --output explained"
    result_kind = "map"
    eager_only = "an explanation reads the inside of the model"

    @property
    def primary(self) -> Metric:
        return Metric("average_drop_50", "min")

    def metrics(self, model: nn.Module) -> Any:
        """Return average_drop_V and increase_V, V in 100, 50, 15 % of the map."""
        from torchmetrics import MeanMetric

        from vitarium.explanation.faithfulness import SHARES

        names = [f"{kind}_{round(100 * v)}" for kind in ("average_drop", "increase") for v in SHARES]
        return nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        from vitarium.explanation.faithfulness import SHARES, average_drop, increase_in_confidence, masked_probability

        image = batch["image"]
        maps, label, p = self.explained(model, image)
        for v in SHARES:
            q = masked_probability(model, image, maps, label, v)
            metrics[f"average_drop_{round(100 * v)}"].update(average_drop(p, q))
            metrics[f"increase_{round(100 * v)}"].update(increase_in_confidence(p, q))

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        return {name: float(metric.compute()) for name, metric in metrics.items()}

    def explained(self, model: Any, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return maps (B, H, W) in [0, 1] of the predictions, their classes (B,) and probabilities (B,).

        Raises:
            InputError: the model has no `own_maps`.
        """
        if not hasattr(model, "own_maps"):
            raise InputError(f"the task explain needs a model with built-in explanations (a TTAME), got a {type(model).__name__}")
        return model.own_maps(image)

    def answers(self, model: Any, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return the label and its probability; `draw` shows the map."""
        maps, label, p = self.explained(model, batch["image"])
        names = getattr(model, "labels", None) or [f"class {i}" for i in range(model.num_classes)]
        rows = zip(label.tolist(), p.tolist(), maps.detach().cpu().numpy(), strict=True)
        return [{"label": names[i], "probability": q, "_map": m, "_preprocessing": model.preprocessing} for i, q, m in rows]

    def draw(self, image: Image.Image, answer: dict[str, Any]) -> Image.Image | None:
        """Draw the map over the image."""
        from vitarium.explanation.heatmap import overlay

        return overlay(image, answer["_map"], answer["_preprocessing"])

    def sheets(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw "explained": held-out images overlaid with their maps."""
        from vitarium.explanation.heatmap import grid_of, overlay_on_input

        image = batch["image"][:8]
        maps, _, _ = self.explained(model, image)
        return {"explained": grid_of([overlay_on_input(x, m, model.preprocessing) for x, m in zip(image, maps, strict=True)])}
