"""Maps as pictures: colours whose lightness rises evenly, laid over the photograph at its own resolution.

H and W are sides of the model's input, pixels; a map is (H, W) in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from vitarium.catalog.preprocessing import Preprocessing, to_mode

MIN_SIDE, MAX_SIDE = 224, 1024
"""Pixels of an overlay's shorter and longer side: small pictures are enlarged, large ones made smaller."""
GAP, CAPTION = 8, 18
GREY = 0.75
"""How far the picture under the colours is turned to grey, so that its own colours are not taken for evidence."""
FAINTEST, STRONGEST = 0.25, 0.7
"""Share of the colour over the picture where the map is 0 and 1."""


def colours(values: ArrayLike) -> NDArray[np.uint8]:
    """Values (...) in [0, 1] -> RGB (..., 3): from black over purple and orange to pale yellow ("inferno")."""
    table = _table()
    index = np.asarray(values, dtype=np.float64).clip(0, 1) * (len(table) - 1)
    return table[index.round().astype(np.int64)]


@functools.cache
def _table() -> NDArray[np.uint8]:
    """256 colours between plotly's ten."""
    from plotly.colors import sequential

    anchors = np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for name in sequential.Inferno], dtype=np.float64)
    places = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(places, np.arange(len(anchors)), anchors[:, c]) for c in range(3)], axis=1).round().astype(np.uint8)


def seen_box(size: tuple[int, int], preprocessing: Preprocessing | None) -> tuple[float, float, float, float]:
    """Left, top, right, lower edge, in pixels of a picture of this (width, height), of the square that the model is shown."""
    width, height = size
    if preprocessing is None:
        return 0.0, 0.0, float(width), float(height)
    shorter = math.floor(preprocessing.image_size / preprocessing.crop_pct)
    side = min(width, height) * preprocessing.image_size / shorter
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def overlay(picture: Image.Image, heat: ArrayLike, preprocessing: Preprocessing | None = None) -> Image.Image:
    """A map over the whole picture that it is about; what the model's crop left out is dark.

    Args:
        picture: as it came, any size and mode.
        heat: (H, W) in [0, 1], of the model's input.
        preprocessing: the model's, which says where its input lay in the picture; None: the whole of it.

    Returns:
        RGB, of the picture's shape, its shorter side at least 224 pixels and its longer side at most 1024 (where both can be).
    """
    picture = to_mode(picture, 3)
    width, height = picture.size
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
    base = np.asarray(picture.resize(large, Image.Resampling.BICUBIC), dtype=np.float32)
    grey = base @ np.array([0.299, 0.587, 0.114], np.float32)
    base = (1 - GREY) * base + GREY * grey[..., None]
    strength = (FAINTEST + (STRONGEST - FAINTEST) * whole)[..., None]
    mixed = np.where(seen[..., None], (1 - strength) * base + strength * colours(whole), 0.25 * base)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def input_picture(image: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
    """What the model sees, (C, H, W) normalised -> an RGB picture."""
    mean, std = (preprocessing.mean, preprocessing.std) if preprocessing is not None else ((0.0,), (1.0,))
    pixels = image.detach().float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.expand(-1, -1, 3).contiguous().numpy())


def overlay_on_input(image: Tensor, heat: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
    """`overlay` over what the model sees: (C, H, W) normalised, and its map (H, W)."""
    return overlay(input_picture(image, preprocessing), heat.detach().float().cpu().numpy())


def grid_of(pictures: Sequence[Image.Image], captions: Sequence[str] = (), *, columns: int = 4, side: int = MIN_SIDE) -> Image.Image:
    """Pictures in rows, each fitted into a square of `side` pixels, with captions above them where there are any."""
    columns = min(columns, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    head = CAPTION if captions else 0
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + head + GAP) - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (side + GAP), i // columns * (side + head + GAP)
        scale = side / max(picture.size)
        fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x + (side - fitted.width) // 2, y + head))
        if captions:
            pen.text((x + 2, y + 2), captions[i], fill="black")
    return sheet
