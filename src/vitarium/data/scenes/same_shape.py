"""Images of two small marks far apart, classified by whether their shapes are equal. The evidence is in two distant places at once.

A plain ViT (64 tokens, width 48, depth 3) is at chance for 600 steps of 64 images, then learns: 90 % after 1,000, 99 % after 1,200.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import around, clouds_of, to_uint8
from vitarium.data.scenes.shapes import SHAPES, Field

MARKS = ("square", "ring")
CLASSES = ("different", "same")
CELLS = 4
"""The image is divided into CELLS x CELLS; each mark is wholly inside a cell, the two in different ones."""
MARK_SIZE = 0.16
"""Diameter of a mark, in image sides."""


def same_shape_label(index: int) -> int:
    """Return the index into CLASSES; the two alternate."""
    return index % 2


def draw_same_shape(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """Render the image of an index, uint8 (size, size, 3): two marks of random positions and shapes on a cloudy ground.

    Single cells carry no information about the class: each shape is equally frequent in both.
    """
    rng = np.random.default_rng((seed, index))
    first = rng.integers(len(MARKS))
    second = first if same_shape_label(index) else (first + rng.integers(1, len(MARKS))) % len(MARKS)
    image = _ground(rng, size)
    cells = np.array(np.unravel_index(rng.choice(CELLS**2, 2, replace=False), (CELLS, CELLS))).T  # column and row of each mark
    for shape, cell in zip((first, second), cells, strict=True):
        radius = size * MARK_SIZE / 2 * rng.uniform(0.9, 1.0)
        room = size / CELLS / 2 - radius
        x, y = (cell + 0.5) * size / CELLS + rng.uniform(-room, room, 2)
        window, u, v = around(x, y, radius, rng.uniform(-0.25, 0.25), size)
        cover = np.clip(0.5 - SHAPES[MARKS[shape]](u, v) * np.float32(radius), 0, 1)
        image[window] += (rng.uniform(200, 255, 3).astype(np.float32) - image[window]) * cover[..., None]
    return to_uint8(image)


def _ground(rng: np.random.Generator, size: int) -> Field:
    noise = clouds_of(2 * size)
    y, x = rng.integers(0, size, 2)
    colour = rng.uniform(30, 80, 3).astype(np.float32)
    return colour * (1 + 0.15 * np.clip(noise[y : y + size, x : x + size, None], -2, 2))
