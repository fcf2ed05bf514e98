"""Training of kMaX-DeepLab: its losses, and drawings of its clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vitarium.ops.precision import without_autocast
from vitarium.perception.kmax_deeplab.decoder import assign
from vitarium.perception.kmax_deeplab.losses import criterion
from vitarium.perception.overlay import grid, overlay
from vitarium.perception.segmentation import SHOWN, SegmentationLearner, first_of, image_of
from vitarium.training.base import Batch
from vitarium.training.learners import learner

if TYPE_CHECKING:
    from PIL import Image


@learner("kmax_deeplab", task="panoptic")
class KMaXLearner(SegmentationLearner):
    """Train by the authors' five losses with their weights, at every layer, on panoptic or other segments."""

    class Settings(SegmentationLearner.Settings):
        """Settings of every segmenter, and of these losses.

        Args:
            samples: number of pixels per image whose similarities are compared.
            deep_supervision: whether every layer's prediction is trained, or only the last one's.
            weights: of class, mask, dice, pixels, semantic, if they differ from the authors'.
        """

        samples: Annotated[int, Field(ge=1)] = 4096
        deep_supervision: bool = True
        weights: dict[Literal["class", "mask", "dice", "pixels", "semantic"], Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    def __init__(self, model: Any, settings: Any = None):
        super().__init__(model, settings)
        self.criterion = criterion(
            samples=self.settings.samples, deep_supervision=self.settings.deep_supervision, weights=self.settings.weights
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses in float32 or better, whatever the precision of the model."""
        prediction = self.model(batch["image"])
        with without_autocast(batch["image"]):
            return self.criterion(_exact(prediction), batch["target"])

    def pictures(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw "segments", as every segmenter does, and "clusters": the query of each pixel in each layer, from first to last."""
        some = first_of(batch, SHOWN)
        found = model(some["image"])
        rows = []
        for i, target in enumerate(some["target"]):
            picture = image_of(model, some["image"][i], target)
            row = [picture]
            for prediction in [*found["aux"], found]:
                clusters = assign(prediction["masks"][i : i + 1])[0]
                place = [
                    torch.arange(n, device=clusters.device) * size // n for n, size in zip(picture.size[::-1], clusters.shape, strict=True)
                ]
                share = [s / full for s, full in zip(target["size"].tolist(), some["image"].shape[-2:], strict=True)]
                rows_, columns = ((p * s).long() for p, s in zip(place, share, strict=True))
                row.append(overlay(picture, 1 + clusters[rows_[:, None], columns].cpu().numpy(), strength=0.8))
            rows.append(row)
        return {**super().pictures(model, batch), "clusters": grid(rows)}


@learner("kmax_deeplab_semantic", task="semantic")
class KMaXSemanticLearner(KMaXLearner):
    """Semantic segmentation: one segment per class."""


@learner("kmax_deeplab_instance", task="instance")
class KMaXInstanceLearner(KMaXLearner):
    """Instance segmentation: one segment per thing; the rest of the image is void."""


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, dict):
        return {name: _exact(part) for name, part in value.items()}
    return [_exact(part) for part in value]
