"""Large letters made of small shapes (Navon figures), classified by both.

The image has CELLS x CELLS cells, and every letter fills as many of them as the others: cells seen one by one show the small shape and not
the letter. The shapes have equal areas, so that an image reduced to one pixel a cell shows the letter and not the shape.

A ResNet of 0.3 M parameters reaches 95 % of the nine classes in 300 steps of 64 (25 seconds on one core), 34 % on the cells one by one,
with the mean of their logits, and 25 % on the means of cells: one scale alone leaves three classes (`benchmarks/scenes.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import around, clouds_of, to_uint8
from vitarium.data.scenes.shapes import SHAPES

LETTERS = {
    "plus": (".#..", "####", ".#..", ".#.."),
    "tee": ("####", ".#..", ".#..", ".#.."),
    "ell": ("#...", "#...", "#...", "####"),
}
RADII = {"square": 0.36, "ring": 0.366, "cross": 0.382}
"""Small shapes with the radius, in cells, at which their areas are equal."""
CLASSES = tuple(f"{letter} of {shape}s" for letter in LETTERS for shape in RADII)
CELLS = 4


def two_scales_label(index: int) -> int:
    """Return the index into CLASSES; they alternate."""
    return index % len(CLASSES)


def draw_two_scales(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """Render the image of an index, uint8 (size, size, 3): a large letter of small shapes on a cloudy ground."""
    rng = np.random.default_rng((seed, index))
    letter, number = divmod(two_scales_label(index), len(RADII))
    shape, cell = list(RADII)[number], size / CELLS
    noise, (top, left) = clouds_of(2 * size), rng.integers(0, size, 2)
    ground = rng.uniform(90, 165, 3).astype(np.float32)
    sign = 1 - 2 * rng.integers(2)  # brighter or darker than the ground, or single pixels would show the letter
    step = sign * rng.uniform(17, 62, 3).astype(np.float32)
    image = ground + 12 * np.clip(noise[top : top + size, left : left + size, None], -2, 2)
    image += rng.normal(0, 14, image.shape).astype(np.float32)
    scale = rng.uniform(0.85, 1.1)
    for row, column in np.argwhere([[mark == "#" for mark in line] for line in list(LETTERS.values())[letter]]):
        radius = RADII[shape] * cell * scale
        x, y = (np.array((column, row)) + 0.5) * cell + rng.uniform(-1, 1, 2) * (cell / 2 - radius)
        window, u, v = around(x, y, radius, rng.uniform(-0.2, 0.2), size)
        cover = np.clip(0.5 - SHAPES[shape](u, v) * np.float32(radius), 0, 1)
        image[window] += step * cover[..., None]
    return to_uint8(image)
