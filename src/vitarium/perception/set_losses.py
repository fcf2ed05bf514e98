"""Set losses: predictions are matched to targets, and terms are summed over the pairs and the layers of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.perception.matching import Pairs, places_of, relative_boxes, sample_points

Prediction = Mapping[str, Any]
Targets = Sequence[dict[str, Tensor]]
Term = Callable[[Prediction, Targets, Any], dict[str, Tensor]]
"""A term: (prediction, targets, matching) -> scalars by name."""


class SetCriterion(nn.Module):
    """Weighted sum of the terms over a prediction and the earlier layers' predictions under "aux".

    Args:
        matcher: (prediction, targets) -> the matching, usually `Pairs`.
        terms: for every layer.
        last_terms: for the last layer only.
        weights: name of a scalar -> its weight; a scalar without weight is reported but not minimised.
        match_once: whether the last layer's matching serves all layers (kMaX); else each layer has its own (DETR).
        supervise_aux: whether earlier layers are trained.
    """

    def __init__(
        self,
        matcher: Callable[[Prediction, Targets], Any],
        terms: Sequence[Term],
        weights: Mapping[str, float],
        *,
        last_terms: Sequence[Term] = (),
        match_once: bool = False,
        supervise_aux: bool = True,
    ):
        super().__init__()
        self.matcher, self.terms, self.last_terms = matcher, list(terms), list(last_terms)
        self.weights, self.match_once, self.supervise_aux = dict(weights), match_once, supervise_aux

    def forward(self, prediction: Prediction, targets: Targets) -> dict[str, Tensor]:
        """Return "loss", the weighted sum, and each term unweighted: the last layer's by its name, the earlier ones' sum as NAME_aux."""
        matched = self.matcher(prediction, targets)
        found = self._of(self.terms, prediction, targets, matched) | self._of(self.last_terms, prediction, targets, matched)
        for earlier in prediction.get("aux", ()) if self.supervise_aux else ():
            again = matched if self.match_once else self.matcher(earlier, targets)
            for name, value in self._of(self.terms, earlier, targets, again).items():
                found[f"{name}_aux"] = found.get(f"{name}_aux", 0) + value
        total = sum(self.weights.get(name.removesuffix("_aux"), 0.0) * value for name, value in found.items())
        return {"loss": torch.as_tensor(total), **found}

    @staticmethod
    def _of(terms: Sequence[Term], prediction: Prediction, targets: Targets, matched: Any) -> dict[str, Tensor]:
        return {name: value for term in terms for name, value in term(prediction, targets, matched).items()}


def mean_count(targets: Targets, device: torch.device) -> Tensor:
    """Return the number of targets of a batch, averaged over processes, at least 1, which normalises set losses."""
    count = torch.tensor(float(sum(len(target["labels"]) for target in targets)), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1)


def matched_labels(logits: Tensor, targets: Targets, pairs: Pairs, void: int) -> Tensor:
    """Return the class of every prediction, (B, L): its target's, or `void`."""
    labels = torch.full(logits.shape[:2], void, dtype=torch.int64, device=logits.device)
    labels[places_of(pairs)] = torch.cat([target["labels"][chosen] for target, (_, chosen) in zip(targets, pairs, strict=True)])
    return labels


class SoftmaxClasses:
    """Return the cross entropy of (B, L, K + 1) logits, the last class void with a smaller weight, as weighted mean. Source: DETR."""

    def __init__(self, void_weight: float = 0.1):
        self.void_weight = void_weight

    def __call__(self, prediction: Prediction, targets: Targets, pairs: Pairs) -> dict[str, Tensor]:
        logits = prediction["logits"]
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = self.void_weight
        return {"class": F.cross_entropy(logits.transpose(1, 2), matched_labels(logits, targets, pairs, logits.shape[-1] - 1), weight)}


class FocalClasses:
    """Return the focal loss of (B, L, K) independent logits, summed, over the mean number of targets. Source: Deformable DETR."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, prediction: Prediction, targets: Targets, pairs: Pairs) -> dict[str, Tensor]:
        from torchvision.ops import sigmoid_focal_loss

        logits = prediction["logits"]
        wanted = F.one_hot(matched_labels(logits, targets, pairs, logits.shape[-1]), logits.shape[-1] + 1)[..., :-1].to(logits)
        return {"class": sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma, "sum") / mean_count(targets, logits.device)}


def box_losses(prediction: Prediction, targets: Targets, pairs: Pairs) -> dict[str, Tensor]:
    """Return L1 of (cx, cy, w, h) and 1 - GIoU of the pairs, over the mean number of targets. Source: DETR."""
    from torchvision.ops import box_convert, generalized_box_iou

    boxes = prediction["boxes"][places_of(pairs)]
    wanted = torch.cat([relative_boxes(target)[chosen] for target, (_, chosen) in zip(targets, pairs, strict=True)])
    giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")).diagonal()
    count = mean_count(targets, boxes.device)
    return {"box": (boxes - wanted).abs().sum() / count, "giou": (1 - giou).sum() / count}


class Masks:
    """Binary cross entropy (or focal loss) and dice of the pairs' masks, over the mean number of targets.

    Args:
        points: number of positions per mask: three times as many are drawn, of which the 75 % least certain are taken, and the rest at
            random (Mask2Former: 12,544); None: all pixels of the target (MaskFormer, DETR), to whose size the prediction is resized.
        focal: whether focal loss (alpha 0.25, gamma 2) replaces cross entropy.
    """

    def __init__(self, points: int | None = None, *, focal: bool = False):
        self.points, self.focal = points, focal

    def __call__(self, prediction: Prediction, targets: Targets, pairs: Pairs) -> dict[str, Tensor]:
        from torchvision.ops import sigmoid_focal_loss

        masks = prediction["masks"][places_of(pairs)]
        count = mean_count(targets, masks.device)
        if not len(masks):
            return {"mask": masks.sum(), "dice": masks.sum()}
        wanted = torch.cat([target["masks"][chosen] for target, (_, chosen) in zip(targets, pairs, strict=True)]).to(masks)
        if self.points is None:
            logits = F.interpolate(masks[:, None], size=wanted.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
            truth = wanted.flatten(1)
        else:
            with torch.no_grad():
                places = uncertain_points(masks, self.points)
                truth = sample_points(wanted[:, None], places)[:, 0]
            logits = sample_points(masks[:, None], places)[:, 0]
        entropy = sigmoid_focal_loss(logits, truth) if self.focal else F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        p = logits.sigmoid()
        dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
        return {"mask": entropy.mean(1).sum() / count, "dice": dice.sum() / count}


def uncertain_points(masks: Tensor, count: int, *, oversample: int = 3, share: float = 0.75) -> Tensor:
    """Draw positions (m, count, 2), x and y from 0 to 1, most of them where mask logits (m, h, w) are near 0. Source: PointRend."""
    drawn = torch.rand(len(masks), oversample * count, 2, device=masks.device, dtype=masks.dtype)
    doubt = -sample_points(masks[:, None], drawn)[:, 0].abs()
    chosen = doubt.topk(int(share * count), dim=1).indices
    near = drawn.gather(1, chosen[..., None].expand(-1, -1, 2))
    rest = torch.rand(len(masks), count - near.shape[1], 2, device=masks.device, dtype=masks.dtype)
    return torch.cat([near, rest], 1)
