"""Metrics of segmentation: panoptic quality, mean IoU, and average precision of masks, with torchmetrics and pycocotools."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision, PanopticQuality

log = logging.getLogger("vitarium")
IGNORE = 255


class Panoptic(PanopticQuality):
    """Panoptic quality PQ = SQ x RQ: mean over classes that occur, over things and stuff separately, and for each class.

    A segment is found if its IoU is above 0.5; void pixels are removed from predictions, and a predicted segment that is mostly void is not
    an error. torchmetrics does not count a segment as missed where the prediction has no segment, although the benchmark does: pixels
    without prediction are therefore a class here, `nothing`, which is then left out.
    """

    def __init__(self, num_classes: int, things: set[int]):
        self.nothing = num_classes
        super().__init__(things, set(range(num_classes + 1)) - things)

    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        found, wrong, missed = self.true_positives, self.false_positives, self.false_negatives
        counted = found + 0.5 * wrong + 0.5 * missed
        places = {
            category: place for category, place in self.cat_id_to_continuous_id.items() if counted[place] > 0 and category != self.nothing
        }
        sq = self.iou_sum / found.clamp(min=1)
        rq = found / counted.clamp(min=0.5)

        def mean(values: Tensor, categories: Any) -> float:
            chosen = [places[c] for c in categories if c in places]
            return float(values[chosen].double().mean()) if chosen else 0.0

        parts = {"pq_things": self.things, "pq_stuff": self.stuffs}
        return {
            "pq": mean(sq * rq, places),
            "sq": mean(sq, places),
            "rq": mean(rq, places),
            **{name: mean(sq * rq, categories) for name, categories in parts.items() if categories - {self.nothing}},
            "pq_of_class": {str(c): float((sq * rq)[place]) for c, place in sorted(places.items())},
        }


class SegmentationMetrics(nn.Module):
    """All metrics of segmentation, accumulated image by image.

    Args:
        num_classes: K.
        things: classes with separate instances; the others are stuff.

    Average precision (COCO's, of thing classes) needs pycocotools, and is left out with a warning if it is not installed.
    """

    def __init__(self, num_classes: int, things: Sequence[int]):
        super().__init__()
        self.num_classes, self.things = num_classes, set(things)
        self.panoptic = Panoptic(num_classes, self.things)
        classes = max(2, num_classes)
        self.miou = MulticlassJaccardIndex(classes, ignore_index=IGNORE, validate_args=False)
        self.pixel_accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE, validate_args=False)
        self.precision: Any = None
        if self.things and importlib.util.find_spec("pycocotools"):
            self.precision = MeanAveragePrecision(iou_type="segm", backend="pycocotools")
        elif self.things:
            log.warning("pycocotools is not installed, so there is no average precision: pip install 'vitarium[dense]'")

    def update(
        self, target: dict[str, Tensor], segment_map: Tensor, segments: list[dict[str, Any]], semantic: Tensor, instances: dict[str, Tensor]
    ) -> None:
        """Add one image.

        Args:
            target: "masks" (n, H, W), "labels" (n,), "iscrowd" (n,) at the image's size.
            segment_map, segments: result of `Segmenter.panoptic`.
            semantic: (H, W) class numbers.
            instances: result of `Segmenter.instances`.
        """
        masks, labels, crowd = target["masks"], target["labels"], target["iscrowd"]
        void = self.num_classes + 1
        truth = torch.full((*masks.shape[1:], 2), void, dtype=torch.long, device=masks.device)
        for i in (~crowd).nonzero().flatten().tolist():
            truth[masks[i]] = torch.stack([labels[i], labels.new_tensor(i)])
        predicted = torch.full_like(truth, self.panoptic.nothing)
        for segment in segments:
            predicted[segment_map == segment["id"]] = labels.new_tensor([segment["category_id"], segment["id"]])
        self.panoptic.update(predicted[None], truth[None])
        classes = torch.where(truth[..., 0] == void, IGNORE, truth[..., 0])[None]
        self.miou.update(semantic[None], classes)
        self.pixel_accuracy.update(semantic[None], classes)
        if self.precision is not None:
            wanted = torch.isin(labels, labels.new_tensor(sorted(self.things)))
            true = {"masks": masks[wanted], "labels": labels[wanted], "iscrowd": crowd[wanted].long()}
            self.precision.update([{k: instances[k] for k in ("masks", "scores", "labels")}], [true])

    def compute(self) -> dict[str, Any]:
        """Return pq, sq, rq, pq_things, pq_stuff, pq_of_class, miou, pixel_accuracy, and ap, ap50, ap75 if available, from 0 to 1."""
        found = self.panoptic.compute() | {"miou": float(self.miou.compute()), "pixel_accuracy": float(self.pixel_accuracy.compute())}
        if self.precision is not None:
            precision = self.precision.compute()
            found |= {ours: max(0.0, float(precision[theirs])) for ours, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"))}
        return found
