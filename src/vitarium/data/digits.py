"""scikit-learn's 1,797 handwritten digits, without a download."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vitarium.data.image_set import ImageData, Samples, Subset, stratified_split

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 16


@functools.cache
def _images() -> tuple[list[Image.Image], list[int]]:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = (raw.images * 255 / 16).round().astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return [Image.fromarray(g).resize(size, Image.Resampling.BICUBIC).convert("RGB") for g in grey], raw.target.tolist()


def open_digits(*, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Return all 1,797 digits as RGB images of 16x16, bicubically upscaled from 8x8; ten classes, split by class with a fixed seed."""
    images, targets = _images()
    digits = Samples(range(len(images)), targets, read=lambda number: images[number].copy(), name=lambda number: f"digits #{number}")
    train, val = stratified_split(digits.targets, val_fraction, seed)
    return ImageData("digits", Subset(digits, train), Subset(digits, val), [str(d) for d in range(10)], IMAGE_SIZE, drawn=True)
