"""What queries with classes and masks mean: panoptic, instance and semantic maps, whatever network they come from.

Legend: L queries, K classes, H W the picture. Probabilities go in, so that one rule serves networks that share pixels out among queries
by a softmax (kMaX) and those that ask each query by itself (Mask2Former).
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
"""What is known of each segment of a map: id (from 1 on; 0 in the map is nothing), category_id, isthing, score."""


def restore_masks(masks: Tensor, padded: Sequence[int], content: Sequence[int], original: Sequence[int]) -> Tensor:
    """Mask logits at a network's own size -> at the picture's: (L, h, w) -> (L, *original).

    Args:
        padded: height and width of the network's input.
        content: of the part of it, at the upper left, that shows the picture.
        original: of the picture.
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
    """kMaX's rule: queries take their pixels in the order of their scores, and one that finds too few of them free is dropped.

    A query's pixels are those where its mask is above `mask_threshold`; its score is its class probability times the mean of its mask
    there. Stuff of one class becomes one segment.

    Args:
        classes: (L, K) probabilities without void.
        masks: (L, H, W) probabilities.
        things: classes whose instances are told apart.
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
    """Mask2Former's rule: a pixel goes to the query whose mask times class is largest; one that loses too much of its mask is dropped.

    Args:
        classes: (L, K + 1) probabilities, the last of void; a query whose largest is void stands for nothing.
        masks: (L, H, W) probabilities.
        things: classes whose instances are told apart.
        class_threshold: least class probability.
        share: least share of a mask (above `mask_threshold`) that the query must win.

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
    """Class shares of each pixel: (L, K) without void, (L, H, W) -> (K, H, W); argmax over the first axis is the semantic map."""
    return torch.einsum("lk,lhw->khw", classes, masks)


def best_instances(
    classes: Tensor, masks: Tensor, things: Collection[int], *, top: int = 100, mask_threshold: float = 0.4
) -> dict[str, Tensor]:
    """The `top` best pairs of query and thing class.

    Args:
        classes: (L, K) probabilities without void.
        masks: (L, H, W) probabilities.

    Returns:
        scores (n,), the class times the mean of the mask; labels (n,); masks (n, H, W) bool; boxes (n, 4) x1, y1, x2, y2 around the masks,
        pixels. From the best on; queries without a pixel are left out.
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
    """(n, H, W) bool -> (n, 4) float32: x1, y1, x2, y2 around each, pixels; x2 and y2 lie one past the last. Zeros for an empty mask."""
    n, h, w = masks.shape
    rows, columns = masks.any(2), masks.any(1)
    y, x = torch.arange(h, device=masks.device), torch.arange(w, device=masks.device)
    low = [torch.where(on, place, size).amin(1) for on, place, size in ((columns, x, w), (rows, y, h))] if n else []
    high = [torch.where(on, place + 1, 0).amax(1) for on, place in ((columns, x), (rows, y))] if n else []
    if not n:
        return torch.zeros(0, 4, device=masks.device)
    return torch.stack([*low, *high], 1).float() * masks.flatten(1).any(1)[:, None]


class Segmenter(nn.Module):
    """A network that tells segments apart: image (B, in_chans, H, W) -> {"logits" (B, L, K + 1), "masks" (B, L, h, w), ...}.

    A subclass says what its numbers mean (`probabilities`, `panoptic`); from that come answers about pictures.

    Args:
        num_classes: K.
        things: classes whose instances are told apart; None: all of them.

    Raises:
        UsageError: a thing that is no class.
    """

    axes = "HW"
    preprocessing: Any = None
    """How a picture becomes the input (vitarium.catalog.Preprocessing); image_size is the longer side's. Set by `create_model`."""
    labels: list[str] | None = None
    """Names of the classes; set by training and `load`."""
    min_size = 1

    def __init__(self, *, num_classes: int, things: Sequence[int] | None, in_chans: int):
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.things = tuple(range(num_classes)) if things is None else tuple(things)
        if wrong := [c for c in self.things if not 0 <= c < num_classes]:
            raise UsageError(f"things are numbers of the {num_classes} classes (0 to {num_classes - 1}), got {wrong[:5]}")

    def check_image(self, image: Tensor) -> None:
        """Refuse what the model cannot take; see `Backbone.check_image`."""
        Backbone.check_image(self, image)  # type: ignore[arg-type]

    def fuse(self) -> Segmenter:
        """For deployment; see `Backbone.fuse`."""
        Backbone.fuse(self)  # type: ignore[arg-type]
        return self

    def probabilities(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Of one picture: (L, K + 1), (L, H, W) logits -> classes (L, K), masks (L, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define probabilities")

    def panoptic(self, classes: Tensor, masks: Tensor) -> tuple[Tensor, Segments]:
        """Of one picture: what `probabilities` gave -> segment map (H, W) and its segments."""
        raise NotImplementedError(f"{type(self).__name__} does not define panoptic")

    def semantic(self, classes: Tensor, masks: Tensor) -> Tensor:
        """Of one picture: what `probabilities` gave -> class shares (K, H, W)."""
        return semantic_map(classes, masks)

    def instances(self, classes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Of one picture: what `probabilities` gave -> scores, labels, masks, boxes; see `best_instances`."""
        return best_instances(classes, masks, self.things)

    def look(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """`probabilities` of a picture in any mode and size, at its own size."""
        tensor, target = FitTransform(self.preprocessing)(picture, None)
        batch, _ = pad_batch([tensor], size=self.preprocessing.image_size)
        with evaluating(self, inference=True):
            found = self(batch.to(next(self.parameters())))
            masks = restore_masks(found["masks"][0].float(), batch.shape[-2:], target["size"].tolist(), target["original_size"].tolist())
            return self.probabilities(found["logits"][0].float(), masks)

    def predict_panoptic(self, picture: Image.Image) -> tuple[Tensor, Segments]:
        """Segment map (H, W) int32 at the picture's size, 0 where nothing is told, and its segments."""
        return self.panoptic(*self.look(picture))

    def predict_semantic(self, picture: Image.Image) -> Tensor:
        """Class numbers (H, W) int64 at the picture's size."""
        return self.semantic(*self.look(picture)).argmax(0)

    def predict_instances(self, picture: Image.Image) -> dict[str, Tensor]:
        """scores, labels, masks, boxes in pixels of the picture."""
        return self.instances(*self.look(picture))
