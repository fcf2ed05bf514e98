"""Drawings of segments over images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.catalog.preprocessing import to_mode

if TYPE_CHECKING:
    from PIL import Image

GOLDEN_ANGLE = 0.381966
SMALLEST_TEXT = 240
"""Images with a smaller longer side are drawn enlarged, so that text is legible."""


def colour_of(number: int) -> tuple[int, int, int]:
    """Return a colour from an unlimited sequence in which neighbours differ strongly in hue."""
    red, green, blue = colorsys.hsv_to_rgb(
        (0.58 + GOLDEN_ANGLE * number) % 1.0, (0.85, 0.6, 0.95)[number % 3], (0.95, 1.0, 0.75)[number % 3]
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(
    image: Image.Image, segment_map: NDArray[np.integer[Any]], names: dict[int, str] | None = None, *, strength: float = 0.55
) -> Image.Image:
    """Draw each segment in its own colour, with its outline, and its name where it is widest.

    Args:
        image: of any mode.
        segment_map: (H, W) of the image's size; pixels with 0 are unchanged.
        names: segment's number -> text; other segments have no text.
        strength: opacity of the colour.
    """
    from PIL import Image

    image = to_mode(image, 3)
    factor = max(1, -(-SMALLEST_TEXT // max(image.size))) if names is not None else 1
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        segment_map = segment_map.repeat(factor, 0).repeat(factor, 1)
    pixels = np.asarray(image).astype(np.float32)
    for number in np.unique(segment_map[segment_map > 0]).tolist():
        inside = segment_map == number
        pixels[inside] += strength * (np.array(colour_of(number), np.float32) - pixels[inside])
    pixels[_outlines(segment_map)] = 255
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    if names:
        _write(drawn, segment_map, names)
    return drawn


def _outlines(segment_map: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return the pixels whose right or lower neighbour belongs to another segment."""
    edges = np.zeros(segment_map.shape, bool)
    edges[:, :-1] |= segment_map[:, 1:] != segment_map[:, :-1]
    edges[:-1] |= segment_map[1:] != segment_map[:-1]
    return edges


def _write(image: Image.Image, segment_map: NDArray[np.integer[Any]], names: dict[int, str]) -> None:
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(11, max(image.size) // 40))
    for number, name in names.items():
        inside = segment_map == number
        if not inside.any():
            continue
        x, y = _middle(inside)
        left, top, right, bottom = draw.textbbox((x, y), name, font=font, anchor="mm")
        shift = max(0, 2 - left) - max(0, right + 2 - image.width), max(0, 2 - top) - max(0, bottom + 2 - image.height)
        place = x + shift[0], y + shift[1]
        draw.text(place, name, font=font, anchor="mm", fill="white", stroke_width=2, stroke_fill=(20, 20, 20))


def _middle(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """Return x and y of the centre of the longest run in a row, among the rows around the segment's own centre."""
    rows = np.flatnonzero(inside.any(1))
    y = int(rows[len(rows) // 2])
    columns = np.flatnonzero(inside[y])
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    widest = max(runs, key=len)
    return int(widest[len(widest) // 2]), y


def grid(rows: Sequence[Sequence[Image.Image]], *, gap: int = 4, least: int = 96) -> Image.Image:
    """Arrange images in rows on white, each scaled to the height of its row's first one, and that to at least `least` pixels."""
    from PIL import Image

    lines = []
    for row in rows:
        height = row[0].height * max(1, -(-least // row[0].height))
        lines.append([p.resize((max(1, round(p.width * height / p.height)), height), Image.Resampling.NEAREST) for p in row])
    width = max(sum(p.width + gap for p in line) for line in lines) + gap
    sheet = Image.new("RGB", (width, sum(line[0].height + gap for line in lines) + gap), "white")
    top = gap
    for line in lines:
        left = gap
        for image in line:
            sheet.paste(image, (left, top))
            left += image.width + gap
        top += line[0].height + gap
    return sheet


def segment_map_of(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Merge masks (n, H, W) into a map (H, W): i + 1 where masks[i] is true (the last of overlapping ones), else 0."""
    found = np.zeros(masks.shape[1:], np.int32)
    for i, mask in enumerate(masks):
        found[mask] = i + 1
    return found
