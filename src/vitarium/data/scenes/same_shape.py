"""Two small marks far apart: are their shapes the same? What a model needs to say so lies in two places of the picture at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import around, clouds_of, to_uint8
from vitarium.data.scenes.shapes import SHAPES, Field

MARKS = ("square", "cross", "ring", "triangle")
CLASSES = ("different", "same")
MARK_SIZE = 0.17
"""Diameter of a mark, in picture sides."""
MIN_DISTANCE = 0.25
"""Marks lie at least so far apart, across or down, in picture sides: in different windows of a 4 x 4 division."""


def same_shape_label(index: int) -> int:
    """Number into CLASSES: the two take turns."""
    return index % 2


def draw_same_shape(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """The picture of a number, uint8 (size, size, 3): two marks of random places, shapes, sizes, angles and colours on a cloudy ground."""
    rng = np.random.default_rng((seed, index))
    first = rng.integers(len(MARKS))
    second = first if same_shape_label(index) else (first + rng.integers(1, len(MARKS))) % len(MARKS)
    margin = MARK_SIZE * 0.55
    while True:
        places = rng.uniform(margin, 1 - margin, (2, 2))
        if np.abs(places[0] - places[1]).max() >= MIN_DISTANCE:
            break
    image = _ground(rng, size)
    for shape, place in zip((first, second), places, strict=True):
        colour = rng.uniform(160, 255, 3).astype(np.float32)
        radius = size * MARK_SIZE / 2 * rng.uniform(0.9, 1.1)
        window, u, v = around(place[0] * size, place[1] * size, radius, rng.uniform(-0.25, 0.25), size)
        cover = np.clip(0.5 - SHAPES[MARKS[shape]](u, v) * np.float32(radius), 0, 1)
        image[window] += (colour - image[window]) * cover[..., None]
    return to_uint8(image)


def _ground(rng: np.random.Generator, size: int) -> Field:
    noise = clouds_of(2 * size)
    y, x = rng.integers(0, size, 2)
    colour = np.float32(rng.uniform(30, 90, 3))
    return colour * (1 + 0.2 * np.clip(noise[y : y + size, x : x + size, None], -2, 2))
