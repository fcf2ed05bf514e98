"""Shapes of one kind whose size is constant in pixels, on a canvas of any size: models trained at one image size are tested at another.

Only the canvas grows: the shapes keep their pixels, and their number is proportional to the area (one in 32 x 32 pixels), so that means
over the image keep their values. (Images that are resized enlarge the objects, too.)

A ResNet of 0.3 M parameters, trained at 32 pixels in 500 steps of 64 (30 seconds on one core), reaches 99.8 % of the six classes there,
95 % at 64, 66 % at 48, and 29 % where images of 64 pixels are resized to its own 32
(`benchmarks/scenes.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import around, clouds_of, to_uint8
from vitarium.data.scenes.shapes import SHAPES

CLASSES = ("square", "triangle", "star", "ring", "cross", "crescent")
RADIUS = 6.0
"""Pixels."""
AREA = 32**2
"""Pixels of the image for each shape."""
APART = 14.0
"""Least distance of two centres, pixels."""
TRIES = 20
GROUND = 128
"""Side of the noise from which each image takes a part, pixels: its waves have the same length at every image size."""


def size_transfer_label(index: int) -> int:
    """Return the index into CLASSES; they alternate."""
    return index % len(CLASSES)


def draw_size_transfer(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """Render the image of an index, uint8 (size, size, 3): shapes of one kind on a cloudy ground."""
    rng = np.random.default_rng((seed, index))
    rows, columns = ((rng.integers(GROUND) + np.arange(size)) % GROUND for _ in range(2))
    noise = clouds_of(GROUND)[rows[:, None], columns, None]
    image = rng.uniform(30, 110, 3).astype(np.float32) * (1 + 0.25 * np.clip(noise, -2, 2))
    for x, y in _places(rng, max(round(size**2 / AREA), 1), size):
        radius = RADIUS * rng.uniform(0.85, 1.15)
        window, u, v = around(x, y, radius, rng.uniform(-0.4, 0.4), size)
        cover = np.clip(0.5 - SHAPES[CLASSES[size_transfer_label(index)]](u, v) * np.float32(radius), 0, 1)
        image[window] += (rng.uniform(140, 255, 3).astype(np.float32) - image[window]) * cover[..., None]
    return to_uint8(image)


def _places(rng: np.random.Generator, count: int, size: int) -> list[NDArray[np.float64]]:
    """Return random centres wholly inside the image and apart from each other, (count, 2); a crowded one may be left out."""
    places: list[NDArray[np.float64]] = []
    margin = 1.15 * RADIUS
    for _ in range(count):
        for _ in range(TRIES):
            place = rng.uniform(margin, size - margin, 2)
            if all(np.hypot(*(place - other)) >= APART for other in places):
                places.append(place)
                break
    return places
