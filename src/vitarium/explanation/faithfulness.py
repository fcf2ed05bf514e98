"""Measures of how faithful a map is to the classifier that it explains: changes of confidence as the image is masked by the map.

| measure | definition | better |
|---|---|---|
| average drop | loss of confidence when only the map's largest pixels are kept | lower |
| increase | share of images for which this raises the confidence | higher |
| insertion | confidence while pixels of the image replace a blurred one, most relevant first (area under the curve) | higher |
| deletion | confidence while pixels are blanked, most relevant first (area under the curve) | lower |
| road | confidence with the least relevant pixels removed, minus that with the most relevant removed | higher |

ROAD (Rong et al., 2022) fills removed pixels from their neighbours, so that the shape of a hole carries no information.

Notation: B batch, C channels, H and W sides; maps are (B, H, W) in [0, 1]; probabilities (B,).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.calibration import probabilities
from vitarium.errors import InputError, UsageError
from vitarium.explanation.reading import logits_of
from vitarium.nn.modes import evaluating

SHARES = (1.0, 0.5, 0.15)
"""Shares of a map's pixels that are kept for average drop and increase."""
ROAD_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 16
"""Number of steps of the insertion and deletion curves."""
MEASURES = ("average_drop", "increase", "insertion", "deletion", "road")


def measure(
    model: nn.Module, image: Tensor, maps: Tensor, target: Tensor | None = None, *, measures: Sequence[str] = MEASURES
) -> dict[str, Tensor]:
    """Return every measure for every image.

    Args:
        model: a classifier, image (B, C, H, W) -> logits (B, num_classes).
        image: normalised, so that 0 is the mean colour.
        maps: (B, H, W) in [0, 1], from any explainer.
        target: classes (B,) that the maps explain; None: the model's predictions.
        measures: a selection of `MEASURES`.

    Returns:
        by name, (B,) each: average_drop_100, _50, _15, increase_100, _50, _15 in percent; insertion, deletion in [0, 1]; road in [-1, 1].

    Raises:
        InputError: the maps have another shape than the image, or values outside [0, 1].
        UsageError: an unknown measure.
    """
    if maps.shape != (len(image), *image.shape[-2:]):
        raise InputError(f"an image {tuple(image.shape)} needs maps {(len(image), *image.shape[-2:])}, got {tuple(maps.shape)}")
    if not bool(((maps >= 0) & (maps <= 1)).all()):
        raise InputError(f"maps must lie in [0, 1], got values from {float(maps.min()):.3g} to {float(maps.max()):.3g}")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise UsageError(f"unknown measure {unknown[0]!r} (measures: {', '.join(MEASURES)})")
    with evaluating(model):
        before = probabilities(model, logits_of(model, model(image)))
        target = before.argmax(dim=1) if target is None else target
        p = before.gather(1, target[:, None])[:, 0]
        found: dict[str, Tensor] = {}
        kept = {v: masked_probability(model, image, maps, target, v) for v in SHARES} if {"average_drop", "increase"} & {*measures} else {}
        if "average_drop" in measures:
            found |= {f"average_drop_{round(100 * v)}": average_drop(p, q) for v, q in kept.items()}
        if "increase" in measures:
            found |= {f"increase_{round(100 * v)}": increase_in_confidence(p, q) for v, q in kept.items()}
        if "insertion" in measures:
            found["insertion"] = insertion(model, image, maps, target)
        if "deletion" in measures:
            found["deletion"] = deletion(model, image, maps, target)
        if "road" in measures:
            found["road"] = road(model, image, maps, target)
    return found


def probability(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Return the probability of each image's class, (B,)."""
    return probabilities(model, logits_of(model, model(image))).gather(1, target[:, None])[:, 0]


def largest(maps: Tensor, share: float) -> Tensor:
    """Return a mask (B, H, W) of the largest pixels of each map, exactly round(share H W) of them."""
    flat = maps.flatten(1)
    count = round(share * flat.shape[1])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter_(1, flat.topk(count, dim=1).indices, True).view_as(maps)


def masked_probability(model: nn.Module, image: Tensor, maps: Tensor, target: Tensor, share: float) -> Tensor:
    """Return the probability (B,) for the image multiplied by its map, with all but the largest share of pixels at 0."""
    return probability(model, image * (maps * largest(maps, share))[:, None], target)


def average_drop(before: Tensor, after: Tensor) -> Tensor:
    """Return 100 max(0, p - p') / p of each image, in percent; its mean is the average drop (Chattopadhay et al., 2018)."""
    return 100 * (before - after).clamp(min=0) / before.clamp(min=torch.finfo(before.dtype).tiny)


def increase_in_confidence(before: Tensor, after: Tensor) -> Tensor:
    """Return 100 if p' > p, else 0; its mean is the increase in confidence, in percent."""
    return 100.0 * (after > before).to(before.dtype)


def insertion(model: nn.Module, image: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS) -> Tensor:
    """Return the mean probability (B,) while the map's largest pixels are inserted into a blurred image (Petsiuk et al., 2018)."""
    return _curve(model, blurred(image), image, maps, target, steps)


def deletion(model: nn.Module, image: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS) -> Tensor:
    """Return the mean probability (B,) while the map's largest pixels are set to the mean colour."""
    return _curve(model, image, torch.zeros_like(image), maps, target, steps)


def _curve(model: nn.Module, start: Tensor, end: Tensor, maps: Tensor, target: Tensor, steps: int) -> Tensor:
    """Return the area under the probability while `start` turns into `end`, largest pixels first (trapezoidal rule)."""
    values = []
    for i in range(steps + 1):
        changed = largest(maps, i / steps)[:, None]
        values.append(probability(model, torch.where(changed, end, start), target))
    return torch.trapezoid(torch.stack(values), dim=0) / steps


def blurred(image: Tensor, share: float = 0.1) -> Tensor:
    """Blur an image with a Gaussian whose standard deviation is this share of its shorter side: colours remain, shapes vanish."""
    sigma = share * min(image.shape[-2:])
    for axis in (-2, -1):
        reach = min(int(3 * sigma) + 1, image.shape[axis] - 1)
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image.device) / sigma) ** 2).to(image.dtype)
        kernel = (weights / weights.sum()).view((-1, 1) if axis == -2 else (1, -1)).expand(image.shape[1], 1, -1, -1)
        pad = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        image = F.conv2d(F.pad(image, pad, mode="reflect"), kernel, groups=image.shape[1])
    return image


def road(
    model: nn.Module, image: Tensor, maps: Tensor, target: Tensor, shares: Sequence[float] = ROAD_SHARES, noise: float = 0.01
) -> Tensor:
    """Return the probability with the least minus that with the most relevant pixels removed, halved, mean over shares: (B,).

    Args:
        noise: standard deviation added to filled-in pixels, which hides their perfect smoothness (the authors' 0.01).
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(len(image), dtype=image.dtype, device=image.device)
    for share in shares:
        for sign, holes in ((-1, largest(maps, share)), (1, largest(-maps, share))):
            filled = filled_in(image, holes)
            noisy = filled + noise * torch.randn(filled.shape, generator=generator).to(filled) * holes[:, None]
            total += sign * probability(model, noisy, target)
    return total / (2 * len(shares))


NEIGHBOURS = [(dy, dx, 1 / 6 if dy == 0 or dx == 0 else 1 / 12) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
"""Row step, column step and weight of the eight neighbours of a pixel."""


def filled_in(image: Tensor, holes: Tensor) -> Tensor:
    """Replace each removed pixel by the weighted mean of its neighbours, also removed ones: one linear system per image.

    Args:
        image: (B, C, H, W).
        holes: (B, H, W) bool, True for removed pixels; an image without remaining pixels becomes 0.
    """
    result = image.clone()
    for i, hole in enumerate(holes.cpu().numpy()):
        if hole.all():
            result[i] = 0
        elif hole.any():
            values = image[i].permute(1, 2, 0).double().cpu().numpy()
            result[i, :, torch.from_numpy(hole).to(image.device)] = torch.from_numpy(_solve(values, hole).T).to(image)
    return result


def _solve(values: NDArray[np.float64], hole: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Solve for the removed pixels: values (H, W, C) and holes (H, W) -> (holes, C), row by row."""
    from scipy.sparse import coo_matrix, csc_matrix
    from scipy.sparse.linalg import splu

    height, width = hole.shape
    number = np.full(hole.shape, -1)
    number[hole] = np.arange(hole.sum())
    y, x = np.nonzero(hole)
    count = len(y)
    weight_sum, known = np.zeros(count), np.zeros((count, values.shape[2]))
    rows, columns, entries = [], [], []
    for dy, dx, weight in NEIGHBOURS:
        ny, nx = y + dy, x + dx
        there = (ny >= 0) & (ny < height) & (nx >= 0) & (nx < width)
        ny, nx = ny.clip(0, height - 1), nx.clip(0, width - 1)
        weight_sum += weight * there
        unknown = there & hole[ny, nx]
        given = there & ~hole[ny, nx]
        known[given] += weight * values[ny[given], nx[given]]
        rows.append(np.nonzero(unknown)[0])
        columns.append(number[ny[unknown], nx[unknown]])
        entries.append(np.full(int(unknown.sum()), -weight))
    rows.append(np.arange(count))
    columns.append(np.arange(count))
    entries.append(weight_sum)
    system = coo_matrix((np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), shape=(count, count))
    return splu(csc_matrix(system)).solve(known)


def pointing(maps: Tensor, evidence: Tensor) -> Tensor:
    """Return 1 for each map whose largest pixel lies on the evidence, else 0: (B,) (the pointing game). Of equal pixels the first counts.

    Args:
        evidence: (B, H, W) bool, such as the box of an object.
    """
    place = maps.flatten(1).argmax(dim=1)
    return evidence.flatten(1).gather(1, place[:, None])[:, 0].to(maps.dtype)
