"""Loss surfaces: the loss on lines and planes through a model's weights, and drawings of them.

    surface = loss_surface(model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches)
    draw_surfaces({"AdamW": surface, "SAM": other}).save("surfaces.png")

The plane through the weights is spanned by two random directions that are filter-normalised (Li et al., "Visualizing the Loss Landscape of
Neural Nets", 2018): each output row of a direction has the norm of that row of the weight, and tensors with one axis are not changed. A
distance of 1 is therefore as large as the weights, and surfaces of different models can be compared.
Cost: one forward pass over the batches per point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vitarium.errors import UsageError
from vitarium.nn.modes import evaluating
from vitarium.training.optim import move_back

PALETTE = np.array(
    [(13, 8, 135), (84, 2, 163), (139, 10, 165), (185, 50, 137), (219, 92, 104), (244, 136, 73), (254, 188, 43), (240, 249, 33)]
)
"""Colours from dark blue to yellow ("plasma"), for low to high values."""

CURVES = [(0, 121, 107), (216, 67, 21), (94, 53, 177), (255, 160, 0), (2, 119, 189)]
PANEL, MARGIN, HEAD, FOOT = 300, 46, 34, 44


@dataclass(frozen=True)
class Surface:
    """Losses on a line or on a square grid around a model's weights.

    Attributes:
        axis: distances along each direction, in units of the weights' own size; its middle is 0.
        losses: (side,) or (side, side); may hold NaN and infinity.
    """

    axis: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def centre(self) -> float:
        """Loss at the weights themselves."""
        return float(self.losses[(len(self.axis) // 2,) * self.losses.ndim])


def loss_surface(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    reach: float = 0.5,
    side: int = 21,
    directions: int = 2,
    seed: int = 0,
) -> Surface:
    """Evaluate the mean loss at points around the weights, which are restored bit for bit. The model is in eval mode meanwhile.

    Args:
        loss: a batch -> mean loss of the current weights, a scalar.
        batches: all have equal weight.
        reach: distance of the border from the weights.
        side: points per axis; odd.
        directions: 1 (a line) or 2 (a plane).
        seed: of the directions; models of one architecture with the same seed share them.

    Raises:
        UsageError: a number is out of range, or there are no batches.
    """
    batches = list(batches)
    if directions not in (1, 2) or side < 3 or side % 2 == 0 or reach <= 0 or not batches:
        given = f"directions={directions}, side={side}, reach={reach}, {len(batches)} batches"
        raise UsageError(f"a surface needs 1 or 2 directions, an odd side of at least 3, a reach above 0 and batches; got {given}")
    generator = torch.Generator().manual_seed(seed)
    before = [(p, p.detach().clone()) for p in model.parameters()]
    moves = [[filter_normalised(weight, generator) for _, weight in before] for _ in range(directions)]
    axis = np.linspace(-reach, reach, side)
    axis[side // 2] = 0.0
    losses = np.zeros((side,) * directions)
    try:
        with evaluating(model, inference=True):
            for place in np.ndindex(*losses.shape):
                for i, (p, weight) in enumerate(before):
                    p.copy_(sum((float(axis[at]) * moves[d][i] for d, at in enumerate(place)), weight))
                losses[place] = sum(float(loss(batch)) for batch in batches) / len(batches)
    finally:
        with torch.no_grad():
            move_back(before)
    return Surface(axis, losses)


def filter_normalised(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction whose rows along the first axis have the weight's norms; zeros for tensors with fewer than two axes."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    rows, norms = drawn.flatten(1), weight.flatten(1).norm(dim=1, keepdim=True)
    return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) * norms).view_as(weight)


def draw_surfaces(surfaces: dict[str, Surface]) -> Image.Image:
    """Draw planes side by side in one colour scale (of the logarithm), with contour lines, or lines in one diagram.

    Args:
        surfaces: by name; either all lines or all planes.

    Raises:
        UsageError: no surfaces, or lines and planes together.
    """
    kinds = {s.losses.ndim for s in surfaces.values()}
    if len(kinds) != 1:
        raise UsageError("a drawing needs at least one surface, and only lines or only planes")
    every = np.concatenate([s.losses.ravel() for s in surfaces.values()])
    finite = np.log10(every[np.isfinite(every) & (every > 0)].clip(1e-6))
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    high = max(high, low + 1e-6)
    return _draw_planes(surfaces, low, high) if kinds == {2} else _draw_lines(surfaces, low, high)


def _draw_planes(surfaces: dict[str, Surface], low: float, high: float) -> Image.Image:
    count = len(surfaces)
    sheet = Image.new("RGB", (count * (PANEL + MARGIN) + MARGIN + 40, HEAD + PANEL + FOOT), "white")
    draw, top = ImageDraw.Draw(sheet), HEAD
    for number, (name, surface) in enumerate(surfaces.items()):
        left = MARGIN + number * (PANEL + MARGIN)
        sheet.paste(_plane(surface, low, high), (left, top))
        draw.text((left + PANEL / 2, HEAD / 2), name, fill="black", font=_font(15), anchor="mm")
        middle = left + PANEL // 2, top + PANEL // 2
        draw.line([middle[0] - 5, middle[1], middle[0] + 5, middle[1]], fill="white", width=2)
        draw.line([middle[0], middle[1] - 5, middle[0], middle[1] + 5], fill="white", width=2)
        for share in (0.0, 0.5, 1.0):
            value = f"{surface.axis[0] + share * (surface.axis[-1] - surface.axis[0]):g}"
            draw.text((left + share * PANEL, top + PANEL + 6), value, fill="black", font=_font(12), anchor="ma")
            draw.text((left - 5, top + (1 - share) * PANEL), value, fill="black", font=_font(12), anchor="rm")
    bar = _coloured(np.linspace(1, 0, PANEL)[:, None].repeat(14, 1))
    left = MARGIN + count * (PANEL + MARGIN) - 26
    sheet.paste(Image.fromarray(bar), (left, top))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = f"{10 ** (low + share * (high - low)):.2g}"
        draw.text((left + 20, top + (1 - share) * PANEL), text, fill="black", font=_font(12), anchor="lm")
    note = "loss along two filter-normalised directions, in units of the weights' size; cross: the trained weights"
    draw.text((MARGIN, top + PANEL + 26), note, fill=(90, 90, 90), font=_font(12))
    return sheet


def _plane(surface: Surface, low: float, high: float) -> Image.Image:
    """Draw the logarithm in colours with white contour lines at tenths of the scale; the first direction points up."""
    height = (np.log10(np.nan_to_num(surface.losses, nan=np.inf, posinf=10**high).clip(1e-6)) - low) / (high - low)
    fine = np.asarray(Image.fromarray(height.clip(0, 1).astype(np.float32)).resize((PANEL, PANEL), Image.Resampling.BICUBIC))[::-1]
    level = np.floor(fine * 10)
    edge = np.zeros(level.shape, dtype=bool)
    edge[1:] |= level[1:] != level[:-1]
    edge[:, 1:] |= level[:, 1:] != level[:, :-1]
    colours = _coloured(fine)
    colours[edge] = (0.6 * colours[edge] + 0.4 * 255).astype(np.uint8)
    return Image.fromarray(colours)


def _draw_lines(surfaces: dict[str, Surface], low: float, high: float) -> Image.Image:
    width, left, top = 2 * PANEL, MARGIN + 14, HEAD
    sheet = Image.new("RGB", (left + width + 20, HEAD + PANEL + FOOT), "white")
    draw = ImageDraw.Draw(sheet)
    reach = max(float(s.axis[-1]) for s in surfaces.values())
    for tick in range(5):
        y = top + PANEL * (1 - tick / 4)
        draw.line([left, y, left + width, y], fill=(225, 225, 225))
        draw.text((left - 6, y), f"{10 ** (low + tick / 4 * (high - low)):.2g}", fill="black", font=_font(12), anchor="rm")
        x = left + width * tick / 4
        draw.text((x, top + PANEL + 6), f"{reach * (tick / 2 - 1):g}", fill="black", font=_font(12), anchor="ma")
    for number, (name, surface) in enumerate(surfaces.items()):
        colour = CURVES[number % len(CURVES)]
        heights = (np.log10(np.nan_to_num(surface.losses, nan=np.inf, posinf=10**high).clip(1e-6)) - low) / (high - low)
        points = [(left + width * (a / reach + 1) / 2, top + PANEL * (1 - h)) for a, h in zip(surface.axis, heights, strict=True)]
        draw.line(points, fill=colour, width=3, joint="curve")
        draw.text((left + number * 150, HEAD / 2), name, fill=colour, font=_font(15), anchor="lm")
    note = "loss along a filter-normalised direction, in units of the weights' size"
    draw.text((left, top + PANEL + 26), note, fill=(90, 90, 90), font=_font(12))
    return sheet


def _coloured(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """Map (H, W) in 0..1 to colours (H, W, 3)."""
    place = shares.clip(0, 1) * (len(PALETTE) - 1)
    below = np.floor(place).astype(int).clip(max=len(PALETTE) - 2)
    part = (place - below)[..., None]
    return (PALETTE[below] * (1 - part) + PALETTE[below + 1] * part).round().astype(np.uint8)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
