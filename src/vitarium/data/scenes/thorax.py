"""Rendered chest X-rays: the same organs in nearly the same places, and four small findings that occur independently.

Like real ones they are grey, look alike, and differ in small details. They contain no medical information.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import clouds_of, to_uint8
from vitarium.data.scenes.shapes import Field

FINDINGS = ("Cardiomegaly", "Effusion", "Infiltration", "Nodule")
CLASSES = ("no nodule", "nodule")
PREVALENCE = 0.3
"""Probability of each finding except Nodule, which occurs in every second image."""
LUNGS = (-0.38, 0.38)
"""Centres of the lungs, from the left, in half image sides from the centre."""


def thorax_label(index: int) -> int:
    """Return the index into CLASSES; the two alternate."""
    return index % 2


def thorax_findings(index: int, seed: int) -> NDArray[np.float32]:
    """Return 1 for each finding of an image, else 0, (len(FINDINGS),), without rendering it."""
    present = np.random.default_rng((seed, index, 1)).random(len(FINDINGS)) < PREVALENCE
    present[FINDINGS.index("Nodule")] = thorax_label(index)
    return present.astype(np.float32)


def draw_thorax(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """Render the image of an index, uint8 (size, size, 3), grey."""
    rng = np.random.default_rng((seed, index))
    seen = dict(zip(FINDINGS, thorax_findings(index, seed), strict=True))
    zoom, shift_x, shift_y = rng.uniform(0.95, 1.08), *rng.uniform(-0.05, 0.05, 2)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    u, v = ((axis - shift) * np.float32(zoom) for shift in (shift_x, shift_y))
    v = v[:, None]

    def oval(x: float, y: float, across: float, down: float, soft: float = 0.06) -> Field:
        """Return the coverage of each pixel by an ellipse with a soft edge (half image sides)."""
        distance = (np.sqrt(((u - x) / across) ** 2 + ((v - y) / down) ** 2) - 1) * min(across, down)
        return np.clip(0.5 - distance / soft, 0, 1)

    image = 18 + 150 * oval(0, 0.25, 0.88, 1.25)
    lungs = [oval(x, -0.05, 0.29, 0.62) for x in LUNGS]
    air = np.maximum(*lungs)
    ribs = 0.5 + 0.5 * np.cos(2 * np.pi * (3.2 * v + 1.1 * u * u + rng.uniform(0, 1)))
    image -= air * (105 - 34 * ribs**3)
    image += 38 * oval(0, 0.2, 0.07, 1.2)  # the spine
    wide = rng.uniform(0.36, 0.42) if seen["Cardiomegaly"] else rng.uniform(0.22, 0.27)
    image += (168 - image) * 0.9 * oval(0.1, 0.32, wide, 0.3)
    side = rng.integers(2)
    if seen["Effusion"]:  # the bottom of a lung is filled, higher at its outer edge
        level = 0.42 - rng.uniform(0, 0.08) - 0.2 * np.abs(u - 0.15 * np.sign(LUNGS[side]))
        image += (172 - image) * np.sqrt(lungs[side]) * np.clip((v - level) / 0.06, 0, 1)
    if seen["Infiltration"]:
        x, y = LUNGS[1 - side] + rng.uniform(-0.06, 0.06), rng.uniform(-0.4, 0.0)
        spots = np.clip(0.6 + _noise(rng, size), 0, 2)
        image += 42 * oval(x, y, 0.2, 0.2, soft=0.3) * spots * air
    if seen["Nodule"]:
        x, y = LUNGS[rng.integers(2)] + rng.uniform(-0.12, 0.12), rng.uniform(-0.45, 0.2)
        radius = rng.uniform(0.055, 0.085)
        image += rng.uniform(45, 70) * oval(x, y, radius, radius)
    image = rng.uniform(0.9, 1.1) * image + 7 * _noise(rng, size) + rng.normal(0, 3, (size, size))
    return np.repeat(to_uint8(image)[..., None], 3, 2)


def _noise(rng: np.random.Generator, size: int) -> Field:
    """Return clouds of mean 0 and deviation 1."""
    y, x = rng.integers(0, size, 2)
    return clouds_of(2 * size)[y : y + size, x : x + size]
