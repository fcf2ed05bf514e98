"""Segmentation: the task, and the base of its learners. A system adds its `loss`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.data.joint import FitTransform, JitterTransform, pad_batch
from vitarium.data.transforms import Augment
from vitarium.errors import DataError, UsageError
from vitarium.perception.masks import Segmenter, boxes_of, restore_masks
from vitarium.perception.overlay import grid, overlay, segment_map_of
from vitarium.training.base import Batch, Learner
from vitarium.training.settings import Section
from vitarium.training.tasks import Metric, TableData, Task, task
from vitarium.training.tasks.base import match_classes

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe

SHOWN = 4
"""Number of images on a sheet."""

PRIMARY = {
    "panoptic": Metric("pq", title="PQ"),
    "semantic": Metric("miou", title="mIoU"),
    "instance": Metric("ap50", title="AP50"),
}


@task("segment")
class Segment(Task):
    """Divide an image into segments with classes.

    Target: {"masks" bool (n, H, W), "labels" (n,), "iscrowd" (n,), "size" and "original_size" (height, width)}; in evaluation the masks
    have the image's own size. The model is a `Segmenter`.

    Args:
        kind: "panoptic": one segment per thing and per class of stuff; "semantic": one segment per class; "instance": things only.
    """

    kind: Literal["panoptic", "semantic", "instance"] = "panoptic"

    own_models = True
    default_data = "scenes"
    usage = "vitarium predict IMAGE --model {file} --output FOLDER"
    result_kind = "segments"

    @property
    def data_kind(self) -> str:  # type: ignore[override]
        return self.kind

    @property
    def primary(self) -> Metric:
        return PRIMARY[self.kind]

    def match(self, model: nn.Module, data: ImageData) -> ImageData:
        """Renumber the segments' classes by their names.

        Raises:
            DataError: a class that the model does not have.
        """

        def renumber(numbers: list[int]) -> Callable[[Any], Any]:
            table = np.array(numbers, np.int64)
            return lambda target: replace(target, labels=table[target.labels])

        matched = match_classes(model, data, renumber, listed=False)
        if matched is data or not getattr(data, "things", ()):
            return matched
        things = {data.classes[c] for c in data.things}  # type: ignore[attr-defined]
        return replace(matched, things=tuple(i for i, name in enumerate(matched.classes) if name in things))  # type: ignore[call-arg]

    def transform(self, model: nn.Module) -> Callable[..., Any]:
        """Return the transform of evaluation: whole images in a square, segments at the image's own size."""
        return FitTransform(preprocessing_of(model), square=True)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """Return "image" (B, C, H, W), "padding" (B, H, W), True outside of an image, and "target", a list of dicts of tensors."""
        if not samples:
            return {"image": torch.empty(0), "padding": torch.empty(0), "target": []}
        image, _ = pad_batch([tensor for tensor, _ in samples])
        padding = torch.ones(len(image), *image.shape[-2:], dtype=torch.bool)
        for row, (_, target) in zip(padding, samples, strict=True):
            height, width = target["size"].tolist()
            row[:height, :width] = False
        return {"image": image, "padding": padding, "target": [target for _, target in samples]}

    # ---- metrics

    def metrics(self, model: Any) -> Any:
        """Return `SegmentationMetrics`."""
        from vitarium.perception.metrics import SegmentationMetrics

        return SegmentationMetrics(model.num_classes, model.things)

    def update(self, metrics: Any, model: Any, batch: Batch) -> None:
        """Measure each image at its own size.

        Raises:
            DataError: classes that the model does not have.
        """
        for target, (classes, masks) in zip(batch["target"], segment_probabilities(model, batch), strict=True):
            if len(target["labels"]) and int(target["labels"].max()) >= model.num_classes:
                raise DataError(f"the data has a class {int(target['labels'].max())}, the model has {model.num_classes} (0 and up)")
            metrics.update(
                target, *model.panoptic(classes, masks), model.semantic(classes, masks).argmax(0), model.instances(classes, masks)
            )

    def summary(self, metrics: Any, model: Any) -> dict[str, Any]:
        """Return the metrics, with class names."""
        found = metrics.compute()
        labels = model.labels or [str(c) for c in range(model.num_classes)]
        found["pq_of_class"] = {labels[int(c)]: value for c, value in found["pq_of_class"].items()}
        return found

    def tables(self, report: dict[str, Any]) -> list[TableData]:
        rows = [[name, f"{value:.4f}"] for name, value in sorted(report["pq_of_class"].items(), key=lambda pair: pair[1])]
        return [TableData("Panoptic quality by class", ["class", ">PQ"], rows)] if rows else []

    # ---- answers

    def answers(self, model: Any, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return "found", a count of each class, and "segments": label, score, area in pixels, box (x1, y1, x2, y2), largest first."""
        labels = model.labels or [f"class {c}" for c in range(model.num_classes)]
        return [described(model, labels, classes, masks) for classes, masks in segment_probabilities(model, batch)]

    def cells(self, answer: dict[str, Any]) -> dict[str, str]:
        return {"found": answer["found"], "segments": str(len(answer["segments"]))}

    def draw(self, image: Image.Image, answer: dict[str, Any]) -> Image.Image:
        """Draw the segments over the image, with their names."""
        names = {segment["id"]: f"{segment['label']} {100 * segment['score']:.0f}" for segment in answer["segments"]}
        return overlay(image, answer["_map"], names)

    def sheets(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw "segments", one row per image: the image, its true segments, and the model's."""
        some = first_of(batch, SHOWN)
        rows = []
        for target, tensor, (classes, masks) in zip(some["target"], some["image"], segment_probabilities(model, some), strict=True):
            image = image_of(model, tensor, target)
            truth = segment_map_of(target["masks"].cpu().numpy())
            segment_map, _ = model.panoptic(classes, masks)
            rows.append([image, overlay(image, truth), overlay(image, segment_map.cpu().numpy())])
        return {"segments": grid(rows)}


def segment_probabilities(model: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return class probabilities (L, K) and masks (L, H, W) for each image of a batch, at its own size."""
    found = model(batch["image"])
    pairs = []
    for target, logits, masks in zip(batch["target"], found["logits"].float(), found["masks"].float(), strict=True):
        size, original = target["size"].tolist(), target["original_size"].tolist()
        pairs.append(model.probabilities(logits, restore_masks(masks, batch["image"].shape[-2:], size, original)))
    return pairs


def described(model: Any, labels: list[str], classes: Tensor, masks: Tensor) -> dict[str, Any]:
    """Return the answer about one image (see `Segment.answers`)."""
    segment_map, segments = model.panoptic(classes, masks)
    rows = []
    for segment in segments:
        inside = segment_map == segment["id"]
        box = [int(value) for value in boxes_of(inside[None])[0].tolist()]
        rows.append(
            dict(
                id=segment["id"],
                label=labels[segment["category_id"]],
                thing=segment["isthing"],
                score=round(segment["score"], 4),
                area=int(inside.sum()),
                box=box,
            )
        )
    rows.sort(key=lambda segment: -segment["area"])
    counts = Counter(segment["label"] for segment in rows)
    things = {segment["label"] for segment in rows if segment["thing"]}
    found = ", ".join(f"{count} {label}" if label in things else label for label, count in counts.items())
    return {"found": found or "nothing", "segments": rows, "_map": segment_map.cpu().numpy()}


def image_of(model: nn.Module, tensor: Tensor, target: dict[str, Tensor]) -> Image.Image:
    """Return the image of a prepared tensor (C, H, W), at its own size."""
    from PIL import Image

    preprocessing = preprocessing_of(model)
    height, width = target["size"].tolist()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = (tensor[:, :height, :width].float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    original = target["original_size"].tolist()
    return image if original == [height, width] else image.resize((original[1], original[0]))


class SegmentationLearner(Learner):
    """Base of the learners of a `Segmenter`; targets are those of `Segment`, in training at the input's size."""

    class Settings(Section):
        """Settings of every segmenter.

        Args:
            jitter: range of the random scale in training; (0.1, 2.0) is the usual large-scale jitter.
        """

        jitter: tuple[float, float] = (1.0, 1.0)

    task_name = "segment"

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> Learner:
        """Build the model for the data's classes and things."""
        from vitarium.training.building import build_model

        things = list(getattr(data, "things", ()))
        model = build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint, things=things)
        return cls(model, recipe.settings_of(cls))

    def __init__(self, model: Any, settings: Any = None):
        if not isinstance(model, Segmenter):
            raise UsageError(f"{type(model).__name__} is no segmenter; 'vitarium models' lists those that are, such as kmax_deeplab_pico")
        super().__init__(model, settings)

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        """Return the transform: whole images in a square; in training scaled and flipped.

        Raises:
            UsageError: an augmentation that would move the image away from its segments.
        """
        if augment is None:
            return super().transform(None)
        usable = augment.model_copy(update=dict(scale=None, policy=None, erase=0.0, pad_crop=0))
        if usable != augment:
            raise UsageError("of the recipe's augment only flip and color_jitter go with segments; for random scales set objective.jitter")
        jitter, preprocessing = self.settings.jitter, preprocessing_of(self.model)
        return JitterTransform(preprocessing, jitter=jitter, flip=augment.flip, color_jitter=augment.color_jitter, square=True)


def first_of(batch: Batch, count: int) -> Batch:
    """Return the first samples of a batch."""
    return {name: value[:count] for name, value in batch.items() if isinstance(value, Tensor | list)}
