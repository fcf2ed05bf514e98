"""Real handwriting without a download: scikit-learn's 1,797 digits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vitarium.data.image_set import ImageData, Subset, stratified_split

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 16


class Digits:
    """All 1,797 digits as RGB pictures of 16x16, bicubically upscaled from 8x8; ten classes."""

    def __init__(self) -> None:
        pictures, self.targets = _pictures()
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._pictures[index].copy(), self.targets[index]

    def describe(self, index: int) -> str:
        """Its number in scikit-learn's order."""
        return f"digits #{index}"


@functools.cache
def _pictures() -> tuple[list[Image.Image], list[int]]:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = (raw.images * 255 / 16).round().astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return [Image.fromarray(g).resize(size, Image.Resampling.BICUBIC).convert("RGB") for g in grey], raw.target.tolist()


def open_digits(*, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """The digits, split by class with a fixed seed."""
    digits = Digits()
    train, val = stratified_split(digits.targets, val_fraction, seed)
    return ImageData("digits", Subset(digits, train), Subset(digits, val), [str(d) for d in range(10)], IMAGE_SIZE)
