"""Images of two handwritten digits in opposite corners, classified by their sum modulo 4. The evidence is in two distant places at once.

The digits are scikit-learn's (8x8, real handwriting), enlarged; every fifth is seen only in held-out images.

A ResNet of 0.3 M parameters reaches 99 % of the four classes (two seeds) in 700 steps of 64 (40 seconds on one core); the same network on
the quadrants one by one, with the mean of their logits, 38 % (`benchmarks/scenes.py`). The best sum of terms of the single digits that a
search found, given the digits, is right for 80 %.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import clouds_of, to_uint8
from vitarium.data.scenes.shapes import Field

MODULUS = 4
CLASSES = tuple(f"sum {rest} mod {MODULUS}" for rest in range(MODULUS))
SHARES = (0.4, 0.3, 0.2, 0.1)
"""Frequency of the digits 0, 1, 2 and 3 in the first corner."""
SIDE = 3 / 8
"""Side of a digit, in image sides: each lies wholly in a quadrant of its own."""
HELD_OUT = 5
"""One of so many images of each digit is kept for held-out images."""


@functools.cache
def handwriting(held_out: bool) -> tuple[Field, ...]:
    """Return the images of each digit below MODULUS, (count, 8, 8) of 0 to 1; the two parts share none."""
    from sklearn.datasets import load_digits

    found = load_digits()
    of_digit = ((found.images[found.target == digit] / 16).astype(np.float32) for digit in range(MODULUS))
    return tuple(images[(np.arange(len(images)) % HELD_OUT == 0) == held_out] for images in of_digit)


def far_sum_label(index: int) -> int:
    """Return the index into CLASSES; they alternate."""
    return index % MODULUS


def draw_far_sum(index: int, seed: int, size: int, *, held_out: bool = False) -> NDArray[np.uint8]:
    """Render the image of an index, uint8 (size, size, 3): two digits in opposite corners of a cloudy ground."""
    rng = np.random.default_rng((seed, index))
    first = int(rng.choice(MODULUS, p=SHARES))
    second = (far_sum_label(index) - first) % MODULUS
    noise, (top, left) = clouds_of(2 * size), rng.integers(0, size, 2)
    image = rng.uniform(20, 60, 3).astype(np.float32) * (1 + 0.2 * np.clip(noise[top : top + size, left : left + size, None], -2, 2))
    half, side = size // 2, round(size * SIDE)
    right = rng.integers(2)  # whether the upper digit is on the right
    for digit, row, column in ((first, 0, right), (second, 1, 1 - right)):
        drawn = handwriting(held_out)[digit]
        cover = enlarge(drawn[rng.integers(len(drawn))], side)
        y, x = np.array((row, column)) * half + rng.integers(0, half - side + 1, 2)
        part = image[y : y + side, x : x + side]
        part += (rng.uniform(170, 255, 3).astype(np.float32) - part) * cover[..., None]
    return to_uint8(image)


def enlarge(image: Field, side: int) -> Field:
    """Resize a square image to side x side, linearly between its pixels."""
    weights = _weights(len(image), side)
    return weights @ image @ weights.T


@functools.cache
def _weights(source: int, target: int) -> Field:
    """Return the weights of each source pixel in each pixel of the target, (target, source)."""
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.clip(1 - np.abs(at[:, None] - np.arange(source)), 0, None).astype(np.float32)
