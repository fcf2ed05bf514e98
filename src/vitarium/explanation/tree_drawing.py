"""Drawings of dependency trees over an image: parts tinted, edges from child to parent, the root ringed.

draw_tree(tree, image).save("tree.png")
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from vitarium.ops.token_tree import Ints, TokenTree

COLOURS = ((255, 170, 40), (60, 190, 255), (90, 215, 120), (255, 105, 150), (190, 140, 255), (245, 230, 80), (60, 220, 200), (255, 130, 90))
"""Colours of the largest parts; all further parts are grey."""
SMALLEST_PART = 3
"""Least number of patches of a part with its own colour."""
OTHERS = (190, 190, 190)
SHADE = (20, 20, 24)
"""Colour of the outlines of lines and dots."""
SIDE, LONGEST = 672, 1600
"""Pixels of the drawing's shorter side, and the largest length of its longer side."""
FINER = 2
"""Supersampling factor of the lines."""


def draw_tree(tree: TokenTree, image: Image.Image, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """Draw a tree over an image; stronger edges are thicker, and tokens that receive more have larger dots.

    Args:
        tree: over the patches of the model's input.
        image: any size and mode.
        box: left, top, right and lower edge, in pixels, of the model's input in the image; None: the whole image. The rest is dark.

    Returns:
        an RGB image of the same aspect ratio, its shorter side 672 pixels unless the longer side would exceed 1600.
    """
    scale = min(SIDE / min(image.size), LONGEST / max(image.size))
    large = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    left, top, right, lower = (round(v * scale) for v in box or (0, 0, *image.size))
    seen = max(1, right - left), max(1, lower - top)
    base = image.convert("RGB").resize(large, Image.Resampling.BICUBIC)
    sheet = Image.fromarray((np.asarray(base, dtype=np.float32) * 0.25).astype(np.uint8))
    parts = tree.parts()
    shown = _tinted(base.crop((left, top, left + seen[0], top + seen[1])), tree.to_pixels(parts), _part_colours(parts))
    _draw_edges(tree, shown, parts)
    sheet.paste(shown.resize(seen, Image.Resampling.LANCZOS), (left, top))
    return sheet


def _draw_edges(tree: TokenTree, shown: Image.Image, parts: Ints) -> None:
    """Draw edges and dots on a drawing of the model's input that is enlarged by FINER."""
    across, down = shown.width / tree.size[1], shown.height / tree.size[0]
    cell = tree.patch_size * min(across, down)
    rows, columns = np.divmod(np.arange(len(tree.parent)), tree.grid[1])
    x, y = (columns + 0.5) * tree.patch_size * across, (rows + 0.5) * tree.patch_size * down
    colours, part = _part_colours(parts), parts.ravel()
    strong = np.sqrt(tree.strength / max(float(tree.strength.max()), 1e-30))
    pen = ImageDraw.Draw(shown, "RGBA")  # translucent, because many edges meet at a hub
    for token in np.argsort(tree.strength, kind="stable").tolist():
        if token != tree.root:
            ends = [(x[token], y[token]), (x[tree.parent[token]], y[tree.parent[token]])]
            thick = cell * (0.025 + 0.09 * strong[token])
            colour = colours.get(int(part[token]), OTHERS)
            pen.line(ends, fill=(*SHADE, 150), width=max(1, round(thick + 0.05 * cell)))
            pen.line(ends, fill=(*colour, 120 if colour is OTHERS else 225), width=max(1, round(thick)))
    share = np.sqrt(tree.received / max(float(tree.received.max()), 1e-30))
    for token in range(len(tree.parent)):
        colour = colours.get(int(part[token]), OTHERS)
        _dot(pen, x[token], y[token], cell * (0.05 + 0.15 * share[token]), colour, SHADE, cell * 0.03)
    _dot(pen, x[tree.root], y[tree.root], cell * 0.36, (255, 255, 255), SHADE, cell * 0.06)
    _dot(pen, x[tree.root], y[tree.root], cell * 0.18, (215, 30, 50), SHADE, cell * 0.03)


def _part_colours(parts: Ints) -> dict[int, tuple[int, int, int]]:
    """Return the colours of the largest parts, by index."""
    numbers, sizes = np.unique(parts[parts > 0], return_counts=True)
    return {int(n): COLOURS[i] for i, n in enumerate(numbers[: len(COLOURS)]) if sizes[i] >= SMALLEST_PART}


def _tinted(image: Image.Image, parts: Ints, colours: dict[int, tuple[int, int, int]]) -> Image.Image:
    """Return the image enlarged by FINER, half desaturated and darkened, with each part tinted in its colour."""
    fine = image.resize((image.width * FINER, image.height * FINER), Image.Resampling.BICUBIC)
    pixels = np.asarray(fine, dtype=np.float64)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    pixels = 0.8 * (0.5 * pixels + 0.5 * grey[..., None])
    rows, columns = (np.arange(n) * side // n for n, side in zip(pixels.shape[:2], parts.shape, strict=True))
    label = parts[rows][:, columns]
    for number, colour in colours.items():
        inside = label == number
        pixels[inside] = 0.6 * pixels[inside] + 0.4 * np.array(colour)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple, outline: tuple, width: float) -> None:
    corners = (x - radius, y - radius, x + radius, y + radius)
    pen.ellipse(corners, fill=fill, outline=outline, width=max(1, round(width)))
