"""Drawings of maps: colours of uniformly increasing lightness, drawn over the image at its own resolution.

Notation: H and W are the sides of the model's input in pixels; a map is (H, W) in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitarium.catalog.preprocessing import Preprocessing, to_mode
from vitarium.texts import printable

MIN_SIDE, MAX_SIDE = 224, 1024
"""Limits on an overlay's shorter and longer side in pixels: small images are enlarged, large ones reduced."""
GAP, CAPTION = 8, 18
GREY = 0.75
"""Share of grey mixed into the image under the colours, so that its own colours are not mistaken for the map's."""
FAINTEST, STRONGEST = 0.25, 0.7
"""Share of the map's colour over the image at the values 0 and 1."""


def colours(values: ArrayLike) -> NDArray[np.uint8]:
    """Convert values (...) in [0, 1] to RGB (..., 3), from black over purple and orange to pale yellow ("inferno")."""
    table = _table()
    index = np.asarray(values, dtype=np.float64).clip(0, 1) * (len(table) - 1)
    return table[index.round().astype(np.int64)]


@functools.cache
def _table() -> NDArray[np.uint8]:
    """Interpolate 256 colours between plotly's ten."""
    from plotly.colors import sequential

    anchors = np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for name in sequential.Inferno], dtype=np.float64)
    places = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(places, np.arange(len(anchors)), anchors[:, c]) for c in range(3)], axis=1).round().astype(np.uint8)


def seen_box(size: tuple[int, int], preprocessing: Preprocessing | None) -> tuple[float, float, float, float]:
    """Return the left, top, right and lower edge, in pixels of an image of this (width, height), of the model's input square."""
    width, height = size
    if preprocessing is None:
        return 0.0, 0.0, float(width), float(height)
    shorter = math.floor(preprocessing.image_size / preprocessing.crop_pct)
    side = min(width, height) * preprocessing.image_size / shorter
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def overlay(image: Image.Image, heat: ArrayLike, preprocessing: Preprocessing | None = None) -> Image.Image:
    """Draw a map over the whole image that it explains; the part outside the model's crop is dark.

    Args:
        image: as given, any size and mode.
        heat: map (H, W) in [0, 1], of the model's input.
        preprocessing: the model's, which locates its input in the image; None: the whole image.

    Returns:
        RGB of the image's aspect ratio, the shorter side at least 224 pixels and the longer side at most 1024 (if both are possible).
    """
    image = to_mode(image, 3)
    width, height = image.size
    scale = max(1.0, MIN_SIDE / min(width, height))
    scale *= min(1.0, MAX_SIDE / (scale * max(width, height)))
    large = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top, right, lower = (round(v) for v in seen_box(large, preprocessing))
    values = Image.fromarray(np.asarray(heat, dtype=np.float32), mode="F")
    inside = np.asarray(values.resize((max(1, right - left), max(1, lower - top)), Image.Resampling.BILINEAR)).clip(0, 1)
    whole, seen = np.zeros(large[::-1], np.float32), np.zeros(large[::-1], bool)
    part = (slice(max(0, top), top + inside.shape[0]), slice(max(0, left), left + inside.shape[1]))
    whole[part] = inside[: whole[part].shape[0], : whole[part].shape[1]]
    seen[part] = True
    base = np.asarray(image.resize(large, Image.Resampling.BICUBIC), dtype=np.float32)
    grey = base @ np.array([0.299, 0.587, 0.114], np.float32)
    base = (1 - GREY) * base + GREY * grey[..., None]
    strength = (FAINTEST + (STRONGEST - FAINTEST) * whole)[..., None]
    mixed = np.where(seen[..., None], (1 - strength) * base + strength * colours(whole), 0.25 * base)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def captioned(drawn: Image.Image, lines: Sequence[str], *, scale: bool = True) -> Image.Image:
    """Add a strip below a drawing: lines of text, and the colours of the values 0 to 1.

    Args:
        drawn: RGB.
        lines: texts, such as the class and the method; each is cut at the drawing's width.
        scale: draw the colours.
    """
    font = ImageFont.load_default(12)
    height = CAPTION * (len(lines) + scale) + 4
    sheet = Image.new("RGB", (drawn.width, drawn.height + height), "white")
    sheet.paste(drawn)
    pen, y = ImageDraw.Draw(sheet), drawn.height + 2
    for line in lines:
        pen.text((4, y + 2), printable(line), fill="black", font=font)
        y += CAPTION
    if scale:
        low, high = "0", "1 (largest)"
        left, right = 10 + round(font.getlength(low)), drawn.width - 10 - round(font.getlength(high))
        pen.text((4, y + 2), low, fill="black", font=font)
        pen.text((right + 6, y + 2), high, fill="black", font=font)
        if right > left:
            bar = colours(np.linspace(0, 1, right - left))[None].repeat(CAPTION - 8, 0)
            sheet.paste(Image.fromarray(bar), (left, y + 4))
    return sheet


def input_picture(image: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
    """Convert a model's input, (C, H, W) normalised, to an RGB image."""
    mean, std = (preprocessing.mean, preprocessing.std) if preprocessing is not None else ((0.0,), (1.0,))
    pixels = image.detach().float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.expand(-1, -1, 3).contiguous().numpy())


def overlay_on_input(image: Tensor, heat: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
    """Draw `overlay` over a model's input: (C, H, W) normalised, and its map (H, W)."""
    return overlay(input_picture(image, preprocessing), heat.detach().float().cpu().numpy())


def grid_of(images: Sequence[Image.Image], captions: Sequence[str] = (), *, columns: int = 4, side: int = MIN_SIDE) -> Image.Image:
    """Arrange images in rows, each fitted into a square of `side` pixels, with captions above them if there are any."""
    columns = min(columns, max(1, len(images)))
    rows = -(-len(images) // columns)
    head = CAPTION if captions else 0
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + head + GAP) - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * (side + GAP), i // columns * (side + head + GAP)
        scale = side / max(image.size)
        fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x + (side - fitted.width) // 2, y + head))
        if captions:
            pen.text((x + 2, y + 2), captions[i], fill="black")
    return sheet
