"""Matching and losses of kMaX-DeepLab, for masks that are a softmax over the queries and do not overlap.

Void pixels, which have no label, are ignored throughout. Weights follow PQ: a query's class loss is weighted by the fit of its mask, its
mask loss by its class probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.perception.kmax_deeplab.parts import resize
from vitarium.perception.matching import Pairs, match, places_of
from vitarium.perception.set_losses import Prediction, SetCriterion, Targets, matched_labels

LEAST_WEIGHT = 1e-5
CLASS_SHARE = 0.75
"""Weight of the loss of queries with a class; void queries have 1 minus it."""
PIXEL_TEMPERATURE = 0.3
WEIGHTS = {"class": 3.0, "mask": 0.3, "dice": 3.0, "pixels": 1.0, "semantic": 1.0}


@dataclass(frozen=True)
class Matched:
    """Targets in the order of the matched queries; (B, L) and (B, L, h, w) with zeros, or void, for unmatched ones.

    Args:
        pairs: queries and targets.
        labels: classes (B, L), K for void.
        masks: shares of the pixels (B, L, h, w); 1 except where targets overlap.
        void: pixels without a target, (B, h, w) bool.
        class_weight, mask_weight: (B, L).
        rarity: h w over the area of the pixel's target, (B, h, w).
        dice, probability: of the pairs, one tensor per image.
    """

    pairs: Pairs
    labels: Tensor
    masks: Tensor
    void: Tensor
    class_weight: Tensor
    mask_weight: Tensor
    rarity: Tensor
    dice: list[Tensor]
    probability: list[Tensor]


def sample_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Subsample (n, H, W) to (n, *size): every s-th pixel from the first if sides are s k + 1, else those nearest the centres."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    places = [_places(old, new, masks.device) for old, new in zip(masks.shape[-2:], size, strict=True)]
    return masks[:, places[0][:, None], places[1]]


def _places(old: int, new: int, device: torch.device) -> Tensor:
    steps = torch.arange(new, device=device)
    if old % 2 == 1 and new > 1 and (old - 1) % (new - 1) == 0:
        return steps * ((old - 1) // (new - 1))
    return ((steps + 0.5) * old / new).long()


def similarity(logits: Tensor, masks: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return class probability (L, n) and dice (L, n) of one image; the matching maximises their product.

    Args:
        logits: (L, K + 1).
        masks: (L, h, w) logits.
        labels: (n,).
        targets: (n, h, w).
    """
    probability = logits.softmax(-1)[:, labels]
    truth = targets.flatten(1).to(masks)
    shares = masks.flatten(1).softmax(0) * (truth.sum(0, keepdim=True) > 0)
    area = (shares.sum(1)[:, None] + truth.sum(1)[None]) / 2
    return probability, shares @ truth.T / (area + 1e-5)


@torch.no_grad()
def match_and_prepare(prediction: Prediction, targets: Targets) -> Matched:
    """Match a prediction {"logits", "masks"}, and arrange the targets in the order of the queries.

    Targets: "labels" (n,), "masks" (n, H, W) of the padded input's size, or smaller (the rest is void).
    """
    logits, masks = prediction["logits"].float(), prediction["masks"].float()
    if prediction["logits"].dtype == torch.float64:
        logits, masks = prediction["logits"], prediction["masks"]
    truths = [sample_masks(target["masks"], masks.shape[-2:]).to(masks) for target in targets]
    alike = [similarity(logits[i], masks[i], target["labels"], truths[i]) for i, target in enumerate(targets)]
    pairs = match(-p * d for p, d in alike)
    place = places_of(pairs)
    probability, dice = ([table[pair] for table, pair in zip(tables, pairs, strict=True)] for tables in zip(*alike, strict=True))
    laid = torch.zeros_like(masks)
    laid[place] = torch.cat([truth[chosen] for truth, (_, chosen) in zip(truths, pairs, strict=True)])
    cover = laid.sum(1)
    laid = laid / cover.clamp(min=1)[:, None]
    void = cover == 0
    shares = masks.softmax(1).flatten(2)
    on_void = (shares @ void.flatten(1).to(shares)[..., None])[..., 0] / (shares.sum(-1) + 1e-5)
    mask_weight = torch.zeros_like(on_void)
    mask_weight[place] = torch.cat(probability).clamp(min=LEAST_WEIGHT)
    class_weight = on_void.clone()
    class_weight[place] = torch.cat(dice)
    area = torch.einsum("blhw,bl->bhw", laid, laid.sum((2, 3)))
    return Matched(
        pairs,
        matched_labels(logits, targets, pairs, logits.shape[-1] - 1),
        laid,
        void,
        class_weight.clamp(min=LEAST_WEIGHT),
        mask_weight,
        void[0].numel() / area.clamp(min=1),
        dice,
        probability,
    )


def _mean_of_non_zero(loss: Tensor) -> Tensor:
    """Average over images of each image's sum over its number of non-zero entries: (B, N) -> scalar."""
    return (loss.sum(1) / (loss != 0).sum(1).clamp(min=1)).mean()


def class_loss(prediction: Prediction, targets: Targets, matched: Matched) -> dict[str, Tensor]:
    """Return the cross entropy of every query, weighted by its mask."""
    logits = prediction["logits"]
    loss = F.cross_entropy(logits.transpose(1, 2), matched.labels, reduction="none")
    is_void = matched.labels == logits.shape[-1] - 1
    return {"class": _mean_of_non_zero(loss * torch.where(is_void, 1 - CLASS_SHARE, CLASS_SHARE) * matched.class_weight)}


def mask_losses(prediction: Prediction, targets: Targets, matched: Matched) -> dict[str, Tensor]:
    """Return the cross entropy over the queries at every pixel, and the dice of every query weighted by its class."""
    masks = resize(prediction["masks"], matched.masks.shape[-2:]).flatten(2)
    truth, void = matched.masks.flatten(2), matched.void.flatten(1)
    entropy = F.cross_entropy(masks, truth, reduction="none").masked_fill(void, 0)
    shares = masks.softmax(1).masked_fill(void[:, None], 0)
    dice = 1 - (2 * (shares * truth).sum(-1) + 1) / (shares.sum(-1) + truth.sum(-1) + 1)
    dice = (dice * matched.mask_weight).sum(1) * CLASS_SHARE / masks.shape[1]
    return {"mask": _mean_of_non_zero(entropy), "dice": dice.mean()}


def draw_pixels(matched: Matched, temperature: float, count: int) -> Tensor:
    """Draw `count` pixels of each image without repetition, (B, count): rare segments' more often, void last."""
    odds = matched.rarity.flatten(1).log() * temperature - 99999.0 * matched.void.flatten(1)
    count = min(count, odds.shape[1])
    noise = torch.rand_like(odds).clamp(min=torch.finfo(odds.dtype).tiny)
    return (odds - (-noise.log()).log()).topk(count, 1).indices


class PixelLoss:
    """Return a contrastive loss on drawn pixels: pixels of one segment should be similar, and unlike all others."""

    def __init__(self, count: int = 4096, temperature: float = 1.5):
        self.count, self.temperature = count, temperature

    def __call__(self, prediction: Prediction, targets: Targets, matched: Matched) -> dict[str, Tensor]:
        pixels = resize(prediction["pixels"], matched.masks.shape[-2:]).flatten(2)
        drawn = draw_pixels(matched, self.temperature, self.count)[:, None]
        truth, pixels = (x.gather(2, drawn.expand(-1, x.shape[1], -1)) for x in (matched.masks.flatten(2), pixels))
        same = truth.transpose(1, 2) @ truth
        same = same / same.sum(1, keepdim=True).clamp(min=1)
        return {"pixels": _mean_of_non_zero(F.cross_entropy(pixels.transpose(1, 2) @ pixels / PIXEL_TEMPERATURE, same, reduction="none"))}


class SemanticLoss:
    """Return the cross entropy of the auxiliary head's classes at drawn pixels."""

    def __init__(self, count: int = 4096, temperature: float = 2.0):
        self.count, self.temperature = count, temperature

    def __call__(self, prediction: Prediction, targets: Targets, matched: Matched) -> dict[str, Tensor]:
        logits = resize(prediction["semantic"], matched.void.shape[-2:])
        ignored = logits.shape[1] - 1
        truth = semantic_truth(targets, logits.shape[-2:], ignored)
        drawn = draw_pixels(matched, self.temperature, self.count)
        truth = truth.flatten(1).gather(1, drawn)
        logits = logits.flatten(2).gather(2, drawn[:, None].expand(-1, logits.shape[1], -1))
        return {"semantic": _mean_of_non_zero(F.cross_entropy(logits, truth, ignore_index=ignored, reduction="none"))}


def semantic_truth(targets: Targets, size: Sequence[int], void: int) -> Tensor:
    """Return the class of each pixel, (B, *size), `void` for none; a target's own "semantic" map (H, W) is used if it has one."""
    maps: list[Tensor] = []
    for target in targets:
        if "semantic" in target:
            maps.append(sample_masks(target["semantic"][None], size)[0])
            continue
        masks = sample_masks(target["masks"], size)
        found = torch.full(tuple(size), void, dtype=torch.int64, device=masks.device)
        for label, mask in zip(target["labels"], masks, strict=True):
            found = torch.where(mask > 0, label, found)
        maps.append(found)
    return torch.stack(maps)


def criterion(*, samples: int = 4096, deep_supervision: bool = True, weights: Mapping[str, float] | None = None) -> SetCriterion:
    """Return the authors' five losses; all but the semantic one at every layer, by the last layer's matching.

    Args:
        samples: number of pixels drawn from each image.
        deep_supervision: whether earlier layers are trained directly.
        weights: replace the authors'.
    """
    terms: list[Any] = [class_loss, mask_losses, PixelLoss(samples)]
    chosen = WEIGHTS | dict(weights or {})
    last = [SemanticLoss(samples)]
    return SetCriterion(match_and_prepare, terms, chosen, last_terms=last, match_once=True, supervise_aux=deep_supervision)
