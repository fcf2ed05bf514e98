"""Retrieval: an image becomes a unit vector, near those of images of the same class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitarium.perception.retrieval.embedding import embeddings_of
from vitarium.training.tasks import Metric, Task, task
from vitarium.training.tasks.base import Batch

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.perception.retrieval.sheet import Found

SHOWN = 6
"""Number of queries on a sheet, and of neighbours of each."""


@task("retrieve")
class Retrieve(Task):
    """Embed images so that those of one class are nearest to each other.

    Target: int64 (), a class that does not occur in training. Output: unit vectors (B, E).
    """

    data_kind = "retrieval"
    usage = "vitarium index FOLDER --model {file} --output images.index"
    result_kind = "embedding"

    @property
    def reads(self) -> Callable[[nn.Module, Tensor], Tensor]:
        return embeddings_of

    @property
    def primary(self) -> Metric:
        return Metric("recall_at_1", "max")

    def transform(self, model: nn.Module) -> Callable[..., Any]:
        return Grouped(super().transform(model))

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """Stack single images, or concatenate groups (G, C, H, W) of one class."""
        return Task.collate([(one, target) for tensor, target in samples for one in (tensor if tensor.ndim == 4 else tensor[None])])

    def metrics(self, model: nn.Module) -> Any:
        """Return recall_at_1, _2, _4, _8 and map_at_r."""
        from vitarium.perception.retrieval.metrics import RetrievalMetric

        return RetrievalMetric()

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        metrics.update(embeddings_of(model, batch["image"]), batch["target"])

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        return metrics.compute()

    def answers(self, model: nn.Module, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return the embeddings as lists of numbers."""
        return [{"embedding": vector} for vector in embeddings_of(model, batch["image"]).tolist()]

    def cells(self, answer: dict[str, Any]) -> dict[str, str]:
        values = answer["embedding"]
        return {"dimensions": str(len(values)), "embedding": ", ".join(f"{v:.3g}" for v in values[:6]) + ", ..."}

    def flat(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {f"embedding_{i}": value for i, value in enumerate(answer["embedding"])}

    def sheets(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Draw "nearest": the batch's first images, each with its nearest neighbours in the batch; those of its class are marked."""
        from vitarium.perception.retrieval.sheet import Found, sheet

        vectors, labels = embeddings_of(model, batch["image"]), batch["target"].tolist()
        if len(vectors) < 2:
            return {}
        near = (vectors @ vectors.mT).fill_diagonal_(-2).topk(min(SHOWN, len(vectors) - 1), dim=1)
        shown = [prepared_image(one, model) for one in batch["image"]]
        rows: list[tuple[Image.Image, Sequence[Found]]] = []
        for q in range(min(SHOWN, len(shown))):
            pairs = zip(near.indices[q].tolist(), near.values[q].tolist(), strict=True)
            rows.append((shown[q], [Found(shown[i], f"{value:.2f}", labels[i] == labels[q]) for i, value in pairs]))
        return {"nearest": sheet(rows)}


class Grouped:
    """Transform one image to (C, H, W), or several of one class to (G, C, H, W).

    Args:
        single: transform of one image.
    """

    joint = True
    needs_target = False

    def __init__(self, single: Any):
        self.single = single

    def __call__(self, image: Any, target: int) -> tuple[Tensor, int]:
        return (torch.stack([self.single(one) for one in image]) if isinstance(image, list) else self.single(image)), target


def prepared_image(image: Tensor, model: nn.Module) -> Image.Image:
    """Return a prepared tensor (C, H, W) as an RGB image."""
    from PIL import Image

    from vitarium.catalog.create import preprocessing_of

    preprocessing = preprocessing_of(model)
    mean, std = (image.new_tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (image * std + mean).clamp(0, 1).mul(255).round().byte().cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
