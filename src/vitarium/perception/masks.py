"""Conversion of queries with classes and masks into panoptic, instance and semantic maps, for any network.

Notation: L queries, K classes, H W the image. Inputs are probabilities, so that one rule serves networks that divide pixels among queries
by a softmax (kMaX) and networks with independent queries (Mask2Former).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.data.joint import FitTransform, pad_batch
from vitarium.errors import UsageError
from vitarium.nn import Backbone
from vitarium.nn.modes import evaluating

if TYPE_CHECKING:
    from PIL import Image

Segments = list[dict[str, Any]]
"""Description of each segment of a map: id (from 1 on; 0 in the map is no segment), category_id, isthing, score."""


def restore_masks(masks: Tensor, padded: Sequence[int], content: Sequence[int], original: Sequence[int]) -> Tensor:
    """Resize mask logits from a network's own size to the image's: (L, h, w) -> (L, *original).

    Args:
        padded: height and width of the network's input.
        content: height and width of the image within it, at the upper left.
        original: height and width of the image.
    """
    aligned = padded[-1] % 2 == 1
    x = F.interpolate(masks[None], size=tuple(padded), mode="bilinear", align_corners=aligned)
    x = x[..., : content[0], : content[1]]
    if tuple(original) != tuple(x.shape[-2:]):
        x = F.interpolate(x, size=tuple(original), mode="bilinear", align_corners=aligned)
    return x[0]


def merge_by_probability(
    classes: Tensor,
    masks: Tensor,
    things: Collection[int],
    *,
    mask_threshold: float = 0.4,
    thing_threshold: float = 0.7,
    stuff_threshold: float = 0.5,
    free_share: float = 0.8,
) -> tuple[Tensor, Segments]:
    """Apply kMaX's rule: queries take their pixels in the order of their scores; a query with too few free pixels is dropped.

    A query's pixels are those where its mask is above `mask_threshold`; its score is its class probability times the mean of its mask
    there. Stuff of one class becomes one segment.

    Args:
        classes: (L, K) probabilities without void.
        masks: (L, H, W) probabilities.
        things: classes with separate instances.
        thing_threshold, stuff_threshold: least class probability.
        free_share: share of its pixels that must still be free.

    Returns:
        segment map (H, W) int32, and its segments.
    """
    confidence, labels = classes.max(-1)
    pixels = masks > mask_threshold
    areas = pixels.flatten(1).sum(1)
    mask_scores = (masks * pixels).flatten(1).sum(1) / areas.clamp(min=1)
    scores = confidence * mask_scores
    segment_map = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    segments: Segments = []
    stuff: dict[int, dict[str, Any]] = {}
    order = scores.argsort(descending=True, stable=True).tolist()
    for query, label, sure, area in zip(order, labels[order].tolist(), confidence[order].tolist(), areas[order].tolist(), strict=True):
        thing = label in things
        if area == 0 or sure <= (thing_threshold if thing else stuff_threshold):
            continue
        free = pixels[query] & (segment_map == 0)
        if int(free.sum()) <= free_share * area:
            continue
        if not thing and label in stuff:
            segment_map[free] = stuff[label]["id"]
            continue
        segment = dict(id=len(segments) + 1, category_id=label, isthing=thing, score=float(scores[query]))
        segment_map[free] = segment["id"]
        segments.append(segment)
        if not thing:
            stuff[label] = segment
    return segment_map, segments


def merge_by_argmax(
    classes: Tensor,
    masks: Tensor,
    things: Collection[int],
    *,
    class_threshold: float = 0.8,
    mask_threshold: float = 0.5,
    share: float = 0.8,
) -> tuple[Tensor, Segments]:
    """Apply Mask2Former's rule: a pixel goes to the query with the largest mask times class; a query that loses too much is dropped.

    Args:
        classes: (L, K + 1) probabilities, the last of void; a query with largest probability of void is dropped.
        masks: (L, H, W) probabilities.
        things: classes with separate instances.
        class_threshold: least class probability.
        share: least share of a mask (above `mask_threshold`) that the query must keep.

    Returns:
        segment map (H, W) int32, and its segments.
    """
    scores, labels = classes.max(-1)
    kept = ((labels != classes.shape[-1] - 1) & (scores > class_threshold)).nonzero().flatten()
    segment_map = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    segments: Segments = []
    if not len(kept):
        return segment_map, segments
    masks, scores, labels = masks[kept], scores[kept], labels[kept]
    winner = (masks * scores[:, None, None]).argmax(0)
    stuff: dict[int, int] = {}
    for i, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
        whole = masks[i] >= mask_threshold
        won = (winner == i) & whole
        area = int(whole.sum())
        if not int(won.sum()) or int((winner == i).sum()) / area < share:
            continue
        thing = label in things
        if not thing and label in stuff:
            segment_map[won] = stuff[label]
            continue
        segments.append(dict(id=len(segments) + 1, category_id=label, isthing=thing, score=score))
        segment_map[won] = segments[-1]["id"]
        if not thing:
            stuff[label] = segments[-1]["id"]
    return segment_map, segments


def semantic_map(classes: Tensor, masks: Tensor) -> Tensor:
    """Return class shares of each pixel: (L, K) without void, (L, H, W) -> (K, H, W); argmax over the first axis is the semantic map."""
    return torch.einsum("lk,lhw->khw", classes, masks)


def best_instances(
    classes: Tensor, masks: Tensor, things: Collection[int], *, top: int = 100, mask_threshold: float = 0.4
) -> dict[str, Tensor]:
    """Return the `top` best pairs of query and thing class.

    Args:
        classes: (L, K) probabilities without void.
        masks: (L, H, W) probabilities.

    Returns:
        scores (n,), the class times the mean of the mask; labels (n,); masks (n, H, W) bool; boxes (n, 4) x1, y1, x2, y2 around the masks,
        pixels. Best first; queries without a pixel are left out.
    """
    wanted = torch.tensor(sorted(things), device=classes.device, dtype=torch.long)
    flat = classes[:, wanted].flatten()
    scores, places = flat.topk(min(top, len(flat)))
    query, labels = places // max(1, len(wanted)), wanted[places % max(1, len(wanted))]
    pixels = masks > mask_threshold
    areas = pixels.flatten(1).sum(1)
    mean = (masks * pixels).flatten(1).sum(1) / areas.clamp(min=1)
    scores = scores * mean[query]
    order = scores.argsort(descending=True, stable=True)
    order = order[areas[query[order]] > 0]
    found = pixels[query[order]]
    return dict(scores=scores[order], labels=labels[order], masks=found, boxes=boxes_of(found))


def boxes_of(masks: Tensor) -> Tensor:
    """Return boxes x1, y1, x2, y2 around masks: (n, H, W) bool -> (n, 4) float32, pixels; x2, y2 exclusive. Zeros for an empty mask."""
    n, h, w = masks.shape
    rows, columns = masks.any(2), masks.any(1)
    y, x = torch.arange(h, device=masks.device), torch.arange(w, device=masks.device)
    low = [torch.where(on, place, size).amin(1) for on, place, size in ((columns, x, w), (rows, y, h))] if n else []
    high = [torch.where(on, place + 1, 0).amax(1) for on, place in ((columns, x), (rows, y))] if n else []
    if not n:
        return torch.zeros(0, 4, device=masks.device)
    return torch.stack([*low, *high], 1).float() * masks.flatten(1).any(1)[:, None]


class Segmenter(nn.Module):
    """Base of segmentation networks: image (B, in_chans, H, W) -> {"logits" (B, L, K + 1), "masks" (B, L, h, w), ...}.

    Subclasses define `probabilities` and `panoptic`, which the predictions for images use.

    Args:
        num_classes: K.
        things: classes with separate instances; None: all.

    Raises:
        UsageError: a thing is not a class number.
    """

    axes = "HW"
    preprocessing: Any = None
    """Preprocessing of images (vitarium.catalog.Preprocessing); image_size is the longer side's. Set by `create_model`."""
    labels: list[str] | None = None
    """Class names; set by training and `load`."""
    min_size = 1

    def __init__(self, *, num_classes: int, things: Sequence[int] | None, in_chans: int):
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.things = tuple(range(num_classes)) if things is None else tuple(things)
        if wrong := [c for c in self.things if not 0 <= c < num_classes]:
            raise UsageError(f"things are numbers of the {num_classes} classes (0 to {num_classes - 1}), got {wrong[:5]}")

    def check_image(self, image: Tensor) -> None:
        """Raise for invalid input; see `Backbone.check_image`."""
        Backbone.check_image(self, image)  # type: ignore[arg-type]

    def fuse(self) -> Segmenter:
        """Prepare for deployment; see `Backbone.fuse`."""
        Backbone.fuse(self)  # type: ignore[arg-type]
        return self

    def probabilities(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Convert one image's logits, (L, K + 1), (L, H, W), to classes (L, K) and masks (L, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define probabilities")

    def panoptic(self, classes: Tensor, masks: Tensor) -> tuple[Tensor, Segments]:
        """Return one image's segment map (H, W) and its segments, from the result of `probabilities`."""
        raise NotImplementedError(f"{type(self).__name__} does not define panoptic")

    def semantic(self, classes: Tensor, masks: Tensor) -> Tensor:
        """Return one image's class shares (K, H, W), from the result of `probabilities`."""
        return semantic_map(classes, masks)

    def instances(self, classes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Return one image's scores, labels, masks and boxes, from the result of `probabilities`; see `best_instances`."""
        return best_instances(classes, masks, self.things)

    def look(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Run `probabilities` on an image of any mode and size, at its own size."""
        tensor, target = FitTransform(self.preprocessing)(image, None)
        batch, _ = pad_batch([tensor], size=self.preprocessing.image_size)
        with evaluating(self, inference=True):
            found = self(batch.to(next(self.parameters())))
            masks = restore_masks(found["masks"][0].float(), batch.shape[-2:], target["size"].tolist(), target["original_size"].tolist())
            return self.probabilities(found["logits"][0].float(), masks)

    def predict_panoptic(self, image: Image.Image) -> tuple[Tensor, Segments]:
        """Return the segment map (H, W) int32 at the image's size, 0 for no segment, and its segments."""
        return self.panoptic(*self.look(image))

    def predict_semantic(self, image: Image.Image) -> Tensor:
        """Return class numbers (H, W) int64 at the image's size."""
        return self.semantic(*self.look(image)).argmax(0)

    def predict_instances(self, image: Image.Image) -> dict[str, Tensor]:
        """Return scores, labels, masks and boxes, in pixels of the image."""
        return self.instances(*self.look(image))
