"""Encoding: the prediction for an image is a feature vector."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitarium.catalog import features
from vitarium.errors import UsageError
from vitarium.training.tasks.base import Batch, Task
from vitarium.training.tasks.registry import task


@task("encode")
class Encode(Task):
    """Compute pooled features (C,) of an image, for probes, indices and teachers. There are no metrics without labels."""

    data_kind = "image"
    usage = "vitarium index FOLDER --model {file} --output images.index"
    result_kind = "features"

    @property
    def reads(self) -> Any:
        return features.pooled_features

    def answers(self, model: Any, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return {"features": [...]} for each image.

        Raises:
            UsageError: the model has no forward_features and forward_head.
        """
        return [{"features": row} for row in pooled_features(model, batch["image"]).float().tolist()]

    def cells(self, answer: dict[str, Any]) -> dict[str, str]:
        values = answer["features"]
        return {"dimensions": str(len(values)), "features": ", ".join(f"{v:.3g}" for v in values[:6]) + ", ..."}

    def flat(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {f"feature_{i}": value for i, value in enumerate(answer["features"])}


def pooled_features(model: nn.Module, image: Any) -> Any:
    """Return pooled features (B, C) of images (B, C, H, W).

    Raises:
        UsageError: the model has no forward_features and forward_head.
    """
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise UsageError(f"{type(model).__name__} does not give features (forward_features, forward_head); use a backbone or an encoder")
    return features.pooled_features(model, image)
