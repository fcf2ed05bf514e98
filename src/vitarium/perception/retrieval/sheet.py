"""Drawings of queries with their results: one row per query, nearest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

CELL, GAP, CAPTION = 112, 8, 16
GREEN, RED, BLACK, GREY = "#2e7d32", "#c62828", "#212121", "#90a4ae"


class Found(NamedTuple):
    """A result: the image (None if its file cannot be read), its caption, and whether it is right (None: unknown)."""

    picture: Image.Image | None
    caption: str
    right: bool | None = None


def sheet(rows: Sequence[tuple[Image.Image, Sequence[Found]]]) -> Image.Image:
    """Draw a row for each query: the query in a black frame, then its results, green if right and red if wrong."""
    columns = 1 + max(len(found) for _, found in rows)
    size = (columns * (CELL + GAP) + 2 * GAP, len(rows) * (CELL + CAPTION + GAP) + GAP)
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    for i, (query, found) in enumerate(rows):
        y = GAP + i * (CELL + CAPTION + GAP)
        _place(drawn, pen, query, GAP, y, BLACK, "query")
        for j, one in enumerate(found, start=1):
            frame = None if one.right is None else GREEN if one.right else RED
            _place(drawn, pen, one.picture, 2 * GAP + j * (CELL + GAP), y, frame, one.caption)
    return drawn


def _place(drawn: Image.Image, pen: ImageDraw.ImageDraw, image: Image.Image | None, x: int, y: int, frame: str | None, text: str) -> None:
    if image is None:
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill="#eceff1")
        pen.text((x + 6, y + CELL // 2 - 6), "file is gone", fill=GREY)
    else:
        image = image.convert("RGB")
        factor = CELL / max(image.size)
        smooth = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
        small = image.resize(tuple(max(1, round(factor * side)) for side in image.size), smooth)  # type: ignore[arg-type]
        drawn.paste(small, (x + (CELL - small.width) // 2, y + (CELL - small.height) // 2))
    if frame is not None:
        pen.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=frame, width=3)
    pen.text((x, y + CELL + 3), text, fill=BLACK)
