"""One pass over the images of a comparison's data: their sizes, a thumbnail and a hash of each, for its checks and its baseline.

It is bounded by `MOST` images and `SECONDS`; of larger sets, or on slower disks, a random sample is looked at, whose order depends on the
seed alone.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data import ImageData, ImageSet
from vitarium.data.clips import still_of
from vitarium.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MOST = 10_000
"""Images that are looked at."""
SECONDS = 15.0
"""Time after which no further image is opened."""
SIDE = 32
"""Largest side of a thumbnail, pixels."""
FIRST = 16
"""Images whose sizes decide the side of the thumbnails."""


@dataclass(frozen=True)
class Looked:
    """The images that were looked at, in random order.

    Attributes:
        part: (N,) 0 of a training image, 1 of a held-out one.
        index: (N,) place in its part.
        size: (N, 2) width and height, pixels.
        thumbnails: (N, S, S, 3) uint8, the whole image reduced to a square of S pixels, at most `SIDE`.
        digests: hash of the decoded pixels of each.
        total: number of images in both parts.
    """

    part: NDArray[np.int64]
    index: NDArray[np.int64]
    size: NDArray[np.int64]
    thumbnails: NDArray[np.uint8]
    digests: list[bytes]
    total: int

    def __len__(self) -> int:
        return len(self.digests)


def look(data: ImageData, *, seed: int = 0, most: int = MOST, seconds: float = SECONDS) -> Looked:
    """Look at a random sample of the images, both parts in proportion; those that cannot be read are left out.

    Args:
        data: images, or clips, of which the middle frame counts.
        seed: of the sample.
        most: images at most.
        seconds: after which no further image is opened.
    """
    counts = len(data.train), len(data.val)
    order = np.random.default_rng(seed).permutation(sum(counts))[:most]
    end = time.perf_counter() + seconds
    side, found = 0, []
    for number in order.tolist():
        part, index = (0, number) if number < counts[0] else (1, number - counts[0])
        image = still((data.train, data.val)[part], index)
        if image is None:
            continue
        side = side or min(SIDE, *image.size)
        found.append((part, index, image.size, _thumbnail(image, side), _digest(image)))
        if time.perf_counter() > end:
            break
    parts, indices, sizes, thumbnails, digests = zip(*found, strict=True) if found else ([], [], [], [], [])
    return Looked(
        np.array(parts, np.int64),
        np.array(indices, np.int64),
        np.array(sizes, np.int64).reshape(-1, 2),
        np.stack(thumbnails) if found else np.empty((0, 1, 1, 3), np.uint8),
        list(digests),
        sum(counts),
    )


def still(images: ImageSet, index: int) -> Image.Image | None:
    """Return an image of a part, the middle frame of a clip; None for one that cannot be read, or a sample without a single image."""
    try:
        item: Any = images[index]
        found = still_of(item[0] if isinstance(item, tuple) else item["image"])
    except (DataError, KeyError):  # unreadable files are counted in training; groups of images have no single one
        return None
    return found if hasattr(found, "convert") else None


def _thumbnail(image: Image.Image, side: int) -> NDArray[np.uint8]:
    small = image.reduce(max(1, min(image.size) // (4 * side))) if image.mode in ("RGB", "L") else image
    return np.asarray(small.convert("RGB").resize((side, side), resample=5), np.uint8)  # 5: hamming, sharp without ringing


def _digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16, person=f"{image.mode} {image.width} {image.height}"[:16].encode()).digest()
