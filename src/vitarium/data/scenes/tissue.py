"""Tiles of stained tissue: nuclei on a coloured ground, classified by their size and elongation.

The nuclei of all classes cover the same area on average, and stains vary from tile to tile, so that mean colours do not show the class. The
tiles contain no medical information.

A ResNet of 0.3 M parameters reaches 90 and 93 % of the four classes (two seeds) in 300 steps of 64 (20 seconds on one core), and 48 % where
squares of four pixels are averaged (`benchmarks/scenes.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import clouds_of, to_uint8
from vitarium.data.scenes.shapes import Field

SIZES = (2.0, 3.0)
"""Radius of a circle of a nucleus' area, pixels at REFERENCE."""
ELONGATIONS = (1.0, 2.3)
"""Long over short axis."""
CLASSES = tuple(f"{size} {form}" for size in ("small", "large") for form in ("round", "long"))
REFERENCE = 32
COVERED = (0.1, 0.22)
"""Range of the share of the tile that nuclei would cover if they did not overlap."""


def tissue_label(index: int) -> int:
    """Return the index into CLASSES; they alternate."""
    return index % len(CLASSES)


def draw_tissue(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """Render the image of an index, uint8 (size, size, 3): nuclei of one size and form on a stained ground."""
    rng = np.random.default_rng((seed, index))
    large, long = divmod(tissue_label(index), len(ELONGATIONS))
    radius = SIZES[large] * size / REFERENCE
    count = max(round(rng.uniform(*COVERED) * size**2 / (np.pi * radius**2)), 2)
    radii = radius * rng.uniform(0.85, 1.15, count)
    stretch = np.sqrt(ELONGATIONS[long] * rng.uniform(0.9, 1.1, count))
    distance = _distances(rng.uniform(0, size, (count, 2)), radii * stretch, radii / stretch, rng.uniform(0, np.pi, count), size)
    noise, (top, left) = clouds_of(2 * size), rng.integers(0, size, 2)
    image: Field = np.array((225, 165, 195), np.float32) + rng.uniform(-25, 25, 3).astype(np.float32)
    image = image + 14 * np.clip(noise[top : top + size, left : left + size, None], -2, 2)
    nucleus = np.array((95, 60, 140), np.float32) + rng.uniform(-30, 30, 3).astype(np.float32)
    cover = np.clip(0.5 - distance, 0, 1)[..., None] * rng.uniform(0.7, 1.0)
    image += (nucleus - image) * np.float32(cover)
    image += rng.normal(0, 5, image.shape).astype(np.float32)
    return to_uint8(image)


def _distances(
    places: NDArray[np.float64], across: NDArray[np.float64], down: NDArray[np.float64], angles: NDArray[np.float64], size: int
) -> Field:
    """Return the distance of each pixel to the nearest of the ellipses, (size, size), negative inside (exact for circles)."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    u, v = (axis[None, None, :] - places[:, 0, None, None], axis[None, :, None] - places[:, 1, None, None])
    cosine, sine = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    a, b = across[:, None, None], down[:, None, None]
    share = np.sqrt(((cosine * u + sine * v) / a) ** 2 + ((cosine * v - sine * u) / b) ** 2)
    return ((share - 1) * np.minimum(a, b)).min(0).astype(np.float32)
