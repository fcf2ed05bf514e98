"""The learner of every segmenter: how pictures with segments become batches, what is measured, what is drawn and told.

A system adds its `loss`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitarium.catalog.create import preprocessing_of
from vitarium.data.joint import FitTransform, JitterTransform, pad_batch
from vitarium.data.transforms import Augment
from vitarium.errors import DataError, UsageError
from vitarium.perception.masks import Segmenter, boxes_of, restore_masks
from vitarium.perception.overlay import grid, overlay, segment_map_of
from vitarium.training.base import Batch, Learner
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe

SHOWN = 4
"""Pictures of a sheet."""


class SegmentationLearner(Learner):
    """A `Segmenter` on pictures with segments.

    A training target is {"masks" (n, H, W) bool at the input's size, "labels" (n,), "iscrowd" (n,), "size"}; in evaluation the masks are at
    the picture's own size, "original_size".
    """

    class Settings(Section):
        """What every segmenter's recipe may say.

        Args:
            jitter: range of the random scale in training; (0.1, 2.0) is the usual large-scale jitter.
        """

        jitter: tuple[float, float] = (1.0, 1.0)

    data_task = "panoptic"
    default_data = "scenes"
    primary_metric = ("pq", "max")
    usage = "vitarium predict IMAGE --model {file} --output FOLDER"

    @classmethod
    def create(cls, name: str, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None) -> Learner:
        """With a model for the data's classes and things."""
        from vitarium.training.building import build_model

        things = list(getattr(data, "things", ()))
        model = build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint, things=things)
        return cls(model, recipe.settings_of(cls))

    def __init__(self, model: Any, settings: Any = None):
        if not isinstance(model, Segmenter):
            raise UsageError(f"{type(model).__name__} is no segmenter; 'vitarium models' lists those that are, such as kmax_deeplab_pico")
        super().__init__(model, settings)

    # ---- samples

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        """Whole pictures in a square; in training scaled and flipped.

        Raises:
            UsageError: an augmentation that would move the picture away from its segments.
        """
        preprocessing = preprocessing_of(self.model)
        if augment is None:
            return FitTransform(preprocessing, square=True)
        usable = augment.model_copy(update=dict(scale=None, policy=None, erase=0.0, pad_crop=0))
        if usable != augment:
            raise UsageError("of the recipe's augment only flip and color_jitter go with segments; for random scales set objective.jitter")
        jitter = self.settings.jitter
        return JitterTransform(preprocessing, jitter=jitter, flip=augment.flip, color_jitter=augment.color_jitter, square=True)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """-> "image" (B, C, H, W), "padding" (B, H, W), True beyond a picture, and "target", a list of dicts of tensors."""
        if not samples:
            return {"image": torch.empty(0), "padding": torch.empty(0), "target": []}
        image, _ = pad_batch([tensor for tensor, _ in samples])
        padding = torch.ones(len(image), *image.shape[-2:], dtype=torch.bool)
        for row, (_, target) in zip(padding, samples, strict=True):
            height, width = target["size"].tolist()
            row[:height, :width] = False
        return {"image": image, "padding": padding, "target": [target for _, target in samples]}

    # ---- what is measured

    def metrics(self) -> Any:
        """See `SegmentationMetrics`."""
        from vitarium.perception.metrics import SegmentationMetrics

        model: Any = self.model
        return SegmentationMetrics(model.num_classes, model.things)

    def evaluate_batch(self, model: Any, batch: Batch, metrics: Any) -> None:
        """Each picture at its own size.

        Raises:
            DataError: classes that the model does not have.
        """
        for target, (classes, masks) in zip(batch["target"], self.look(model, batch), strict=True):
            if len(target["labels"]) and int(target["labels"].max()) >= model.num_classes:
                raise DataError(f"the data have a class {int(target['labels'].max())}, the model has {model.num_classes} (0 and up)")
            metrics.update(
                target, *model.panoptic(classes, masks), model.semantic(classes, masks).argmax(0), model.instances(classes, masks)
            )

    def summary(self, metrics: Any) -> dict[str, Any]:
        """With the names of the classes."""
        found = metrics.compute()
        model: Any = self.model
        labels = model.labels or [str(c) for c in range(model.num_classes)]
        found["pq_of_class"] = {labels[int(c)]: value for c, value in found["pq_of_class"].items()}
        return found

    def look(self, model: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Probabilities of classes (L, K) and masks (L, H, W) of each picture of a batch, at its own size."""
        found = model(batch["image"])
        pairs = []
        for target, logits, masks in zip(batch["target"], found["logits"].float(), found["masks"].float(), strict=True):
            size, original = target["size"].tolist(), target["original_size"].tolist()
            pairs.append(model.probabilities(logits, restore_masks(masks, batch["image"].shape[-2:], size, original)))
        return pairs

    # ---- what people see

    def pictures(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """segments: a row a picture: itself, its segments as they are, and as the model sees them."""
        some = first_of(batch, SHOWN)
        rows = []
        for target, tensor, (classes, masks) in zip(some["target"], some["image"], self.look(model, some), strict=True):
            picture = self.picture_from(tensor, target)
            truth = segment_map_of(target["masks"].cpu().numpy())
            segment_map, _ = model.panoptic(classes, masks)
            rows.append([picture, overlay(picture, truth), overlay(picture, segment_map.cpu().numpy())])
        return {"segments": grid(rows)}

    def picture_from(self, tensor: Tensor, target: dict[str, Tensor]) -> Image.Image:
        """The picture that became a tensor (C, H, W), at its own size."""
        from PIL import Image

        preprocessing = preprocessing_of(self.model)
        height, width = target["size"].tolist()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        pixels = (tensor[:, :height, :width].float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        original = target["original_size"].tolist()
        return picture if original == [height, width] else picture.resize((original[1], original[0]))

    def answers(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """found: how many of what; segments: label, score, area in pixels, box (x1, y1, x2, y2), from the largest on."""
        answers = []
        labels = model.labels or [f"class {c}" for c in range(model.num_classes)]
        for classes, masks in self.look(model, batch):
            segment_map, segments = model.panoptic(classes, masks)
            told = []
            for segment in segments:
                inside = segment_map == segment["id"]
                box = [int(value) for value in boxes_of(inside[None])[0].tolist()]
                told.append(
                    dict(
                        id=segment["id"],
                        label=labels[segment["category_id"]],
                        thing=segment["isthing"],
                        score=round(segment["score"], 4),
                        area=int(inside.sum()),
                        box=box,
                    )
                )
            told.sort(key=lambda segment: -segment["area"])
            counts = Counter(segment["label"] for segment in told)
            things = {segment["label"] for segment in told if segment["thing"]}
            found = ", ".join(f"{count} {label}" if label in things else label for label, count in counts.items())
            answers.append({"found": found or "nothing", "segments": told, "_map": segment_map.cpu().numpy()})
        return answers

    def picture_of(self, picture: Image.Image, answer: dict[str, Any]) -> Image.Image:
        """The segments over the picture, with their names."""
        names = {segment["id"]: f"{segment['label']} {100 * segment['score']:.0f}" for segment in answer["segments"]}
        return overlay(picture, answer["_map"], names)


def first_of(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""
    return {name: value[:count] for name, value in batch.items() if isinstance(value, Tensor | list)}
