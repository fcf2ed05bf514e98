"""Grids of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vitarium.texts import printable

if TYPE_CHECKING:
    from PIL import Image

SMALL = 48  # pixels; smaller images are enlarged, without smoothing
HEAD = 20  # pixels of a line of captions


def to_image(image: Tensor) -> Image.Image:
    """Convert (1 or 3, H, W) in [0, 1] to an image with 8 bits per channel."""
    from PIL import Image

    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2, smallest: int = SMALL, captions: Sequence[str] = ()) -> Image.Image:
    """Arrange images (B, 1 or 3, H, W) in [0, 1] in a grid on white.

    Args:
        columns: images per row; None: about as many as rows.
        gap: pixels between them.
        smallest: side in pixels from which images keep their size; smaller ones are enlarged by a whole factor.
        captions: text above each column, cut to its width.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    times = max(1, math.ceil(smallest / max(images.shape[-2:])))
    height, width = (side * times for side in images.shape[-2:])
    head = HEAD if captions else 0
    sheet = Image.new("RGB", (columns * (width + gap) - gap, head + rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        tile = to_image(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * (width + gap), head + i // columns * (height + gap)))
    if captions:
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for i, caption in enumerate(captions[:columns]):
            pen.text(
                (i * (width + gap) + width / 2, head / 2), fitted(printable(caption), width, font.getlength), "black", font, anchor="mm"
            )
    return sheet


def fitted(text: str, width: float, length: Callable[[str], float]) -> str:
    """Return a text that is at most `width` long by `length`: shortened, and marked with an ellipsis, if it is longer."""
    if length(text) <= width:
        return text
    while text and length(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..." if text else ""
