"""Grids of images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SMALL = 48  # pixels; smaller images are enlarged, without smoothing


def to_image(image: Tensor) -> Image.Image:
    """Convert (1 or 3, H, W) in [0, 1] to an image with 8 bits per channel."""
    from PIL import Image

    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2) -> Image.Image:
    """Arrange images (B, 1 or 3, H, W) in [0, 1] in a grid on white.

    Args:
        columns: images per row; None: about as many as rows.
        gap: pixels between them.
    """
    from PIL import Image

    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    times = max(1, math.ceil(SMALL / max(images.shape[-2:])))
    height, width = (side * times for side in images.shape[-2:])
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        tile = to_image(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
