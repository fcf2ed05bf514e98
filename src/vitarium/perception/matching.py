"""Bipartite matching of predictions and targets, and the costs that it minimises.

Notation: L predictions (queries), n targets of an image, K classes, P positions (pixels, or points) of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Pairs = list[tuple[Tensor, Tensor]]
"""Indices of the matched predictions and of their targets for each image, int64 (m,) each, m = min(L, n)."""


def match(costs: Iterable[Tensor]) -> Pairs:
    """Return the matching of least cost for each image.

    Args:
        costs: (L, n) of each image, any device and dtype; non-finite values count as very large.

    Returns:
        pairs in the order of the predictions, on the costs' device.
    """
    from scipy.optimize import linear_sum_assignment

    found: Pairs = []
    for cost in costs:
        table = torch.nan_to_num(cost.detach().double().cpu(), nan=1e9, posinf=1e9, neginf=-1e9).numpy()
        predictions, targets = linear_sum_assignment(table)
        found.append(tuple(torch.as_tensor(side, dtype=torch.int64, device=cost.device) for side in (predictions, targets)))  # type: ignore[arg-type]
    return found


def places_of(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return image and prediction index of every pair, (sum m,) each: an index into (B, L, ...) tensors."""
    images = torch.cat([torch.full_like(predictions, i) for i, (predictions, _) in enumerate(pairs)])
    return images, torch.cat([predictions for predictions, _ in pairs])


def softmax_class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative probability of the target's class: (L, K + 1) logits, (n,) -> (L, n). Source: DETR."""
    return -logits.softmax(-1)[:, labels]


def focal_class_cost(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss with the target's class as a positive minus that as a negative: (L, K) logits, (n,) -> (L, n). Source:
    Deformable DETR."""
    p = logits.sigmoid()[:, labels]
    yes = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    no = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return yes - no


def box_l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the L1 distance: (L, 4), (n, 4), both cx, cy, w, h relative to the image -> (L, n)."""
    return torch.cdist(boxes, targets, p=1)


def box_giou_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the negative generalised IoU: (L, 4), (n, 4), both cx, cy, w, h -> (L, n)."""
    from torchvision.ops import box_convert, generalized_box_iou

    return -generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(targets, "cxcywh", "xyxy"))


def mask_ce_cost(masks: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross entropy, mean over positions: (L, P) logits, (n, P) 0..1 -> (L, n). Source: Mask2Former."""
    positive, negative = F.softplus(-masks), F.softplus(masks)  # -log p and -log(1 - p)
    return (positive @ targets.T + negative @ (1 - targets).T) / masks.shape[1]


def mask_dice_cost(masks: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - (2 sum p t + 1) / (sum p + sum t + 1): (L, P) logits, (n, P) 0..1 -> (L, n). Source: MaskFormer."""
    p = masks.sigmoid()
    return 1 - (2 * p @ targets.T + 1) / (p.sum(1)[:, None] + targets.sum(1)[None] + 1)


def relative_boxes(target: dict[str, Tensor]) -> Tensor:
    """Convert a target's boxes x1, y1, x2, y2 in pixels to cx, cy, w, h relative to its "size" (height, width): (n, 4)."""
    from torchvision.ops import box_convert

    height, width = target["size"].tolist()
    return box_convert(target["boxes"], "xyxy", "cxcywh") / target["boxes"].new_tensor([width, height, width, height])


class Matcher:
    """Matching by a weighted sum of costs, for predictions {"logits" (B, L, K...), "boxes" (B, L, 4), "masks" (B, L, h, w)}.

    Known weights (class, l1, giou): DETR 1, 5, 2; Deformable DETR and ViDT 2, 5, 2 with focal classes; (class, mask, dice): MaskFormer
    1, 20, 1; Mask2Former 2, 5, 5 at 12,544 points.

    Args:
        classes, l1, giou, mask, dice: weights; 0 leaves a cost out.
        focal: whether classes use the focal cost, for models with an independent logit per class.
        points: number of random points of a mask that are compared; None: all pixels of the predicted mask.
    """

    def __init__(
        self,
        *,
        classes: float = 1.0,
        l1: float = 0.0,
        giou: float = 0.0,
        mask: float = 0.0,
        dice: float = 0.0,
        focal: bool = False,
        points: int | None = None,
    ):
        self.classes, self.l1, self.giou, self.mask, self.dice = classes, l1, giou, mask, dice
        self.class_cost = focal_class_cost if focal else softmax_class_cost
        self.points = points

    @torch.no_grad()
    def __call__(self, predictions: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> Pairs:
        """Match a batch. Targets: "labels" (n,) and, depending on the weights, "boxes" (n, 4) in pixels with "size", "masks" (n, H, W)."""
        return match(
            self.cost({k: v[i].float() for k, v in predictions.items() if isinstance(v, Tensor)}, t) for i, t in enumerate(targets)
        )

    def cost(self, prediction: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        """Return the costs of one image, (L, n)."""
        total = self.classes * self.class_cost(prediction["logits"], target["labels"])
        if self.l1 or self.giou:
            boxes = relative_boxes(target)
            total = total + self.l1 * box_l1_cost(prediction["boxes"], boxes) + self.giou * box_giou_cost(prediction["boxes"], boxes)
        if self.mask or self.dice:
            masks, wanted = self.sample(prediction["masks"], target["masks"])
            total = total + self.mask * mask_ce_cost(masks, wanted) + self.dice * mask_dice_cost(masks, wanted)
        return total

    def sample(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sample (L, h, w) logits and (n, H, W) masks at the same positions: (L, P), (n, P)."""
        if self.points is None:
            wanted = F.interpolate(targets[None].float(), size=masks.shape[-2:], mode="nearest-exact")[0]
            return masks.flatten(1), wanted.flatten(1)
        place = torch.rand(1, self.points, 2, device=masks.device)
        return sample_points(masks[None], place)[0], sample_points(targets[None].float(), place)[0]


def sample_points(maps: Tensor, places: Tensor) -> Tensor:
    """Interpolate maps (B, C, H, W) bilinearly at positions (B, P, 2), x and y from 0 to 1: (B, C, P)."""
    return F.grid_sample(maps, 2 * places[:, :, None] - 1, align_corners=False)[..., 0]
