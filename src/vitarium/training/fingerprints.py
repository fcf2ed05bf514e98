"""Fingerprints of training images: whether an image was trained on can be asked of a saved model, wherever the image's file is now.

    record = fingerprint_images(data.train)          # in the model's file: up to 33 kB
    seen = trained_among(data.val, record)           # 3 of 250 images were trained on

The digest of a file is a hash of its size and content (of files over 48 kB: of 16 kB at the start, in the middle and at the end), so that
neither moving nor renaming it matters. Images without a file (rendered, embedded, in shards) are decoded, and their pixels are hashed. Of
sets over `MOST` images only those are taken whose names (file and folder) have the lowest hashes; the same rule selects the images that are
compared with them, so that the share that was trained on is estimated from this sample, and renamed copies are not recognised.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vitarium.catalog.record import ImagesRecord
from vitarium.errors import VitariumError

MOST = 4096
"""Largest number of images in a fingerprint."""
MOST_DECODED = 2048
"""Largest number where images have to be decoded."""
BYTES = 6
"""Length of a digest: two of 10^5 images with 4096 others agree by chance once in 10^6 sets."""
BLOCK = 16 * 2**10
"""Bytes that are read at each of three places of a large file."""


@dataclass(frozen=True)
class Seen:
    """Images of a set that a model was trained on.

    Attributes:
        trained: number of the compared images that it was trained on.
        compared: number of images that could be compared.
        images: number of images in the set.
    """

    trained: int
    compared: int
    images: int

    @property
    def estimate(self) -> int:
        """Number of images of the whole set that the model was trained on, in proportion to the compared ones."""
        return round(self.images * self.trained / self.compared) if self.compared else 0

    def __str__(self) -> str:
        if not self.compared:
            return "unknown"
        if self.compared < self.images:
            return f"about {self.estimate} of {self.images} ({self.trained} of {self.compared} compared)"
        return f"{self.trained} of {self.images}"


def fingerprint_images(images: Any) -> ImagesRecord:
    """Return the fingerprint of an image set."""
    hashes = [_hash_of_name(images, index) for index in range(len(images))]
    limit = MOST if len(images) and os.path.isfile(_name(images, 0)) else MOST_DECODED
    below = None
    if len(hashes) > limit:
        ordered = sorted(hashes)
        below = ordered[limit - 1]
        if ordered[limit] == below:  # many images of one name
            below = max((h for h in ordered if h < below), default=below)
    chosen = [index for index, h in enumerate(hashes) if below is None or h <= below][:limit]
    digests = sorted({digest for index in chosen if (digest := _digest(images, index))})
    return ImagesRecord(count=len(images), below=below, digests=base64.b64encode(b"".join(digests)).decode())


def trained_among(images: Any, record: ImagesRecord) -> Seen:
    """Count the images of a set that are in the fingerprint of a model's training images."""
    known = _digests_of(record)
    compared = trained = 0
    for index in range(len(images)):
        if record.below is not None and _hash_of_name(images, index) > record.below:
            continue
        if digest := _digest(images, index):
            compared += 1
            trained += digest in known
    return Seen(trained, compared, len(images))


def _digests_of(record: ImagesRecord) -> set[bytes]:
    whole = base64.b64decode(record.digests)
    return {whole[i : i + BYTES] for i in range(0, len(whole), BYTES)}


def _name(images: Any, index: int) -> str:
    return str(images.describe(index)) if hasattr(images, "describe") else str(index)


def _hash_of_name(images: Any, index: int) -> int:
    """Return a 48-bit hash of an image's name with its folder, which a move of the whole set does not change."""
    parts = PurePath(_name(images, index)).parts[-2:]
    return int.from_bytes(hashlib.blake2b("/".join(parts).encode("utf-8", "surrogateescape"), digest_size=6).digest(), "big")


def _digest(images: Any, index: int) -> bytes | None:
    """Return the digest of an image's content; None for an image that cannot be read."""
    name = _name(images, index)
    try:
        content = _of_file(name) if os.path.isfile(name) else _of_sample(images[index], name)
    except (OSError, VitariumError):
        return None
    return hashlib.blake2b(content, digest_size=BYTES).digest()


def _of_file(name: str) -> bytes:
    size = os.path.getsize(name)
    with open(name, "rb") as file:
        if size <= 3 * BLOCK:
            content = file.read()
        else:
            content = b""
            for place in (0, (size - BLOCK) // 2, size - BLOCK):
                file.seek(place)
                content += file.read(BLOCK)
    return size.to_bytes(8, "big") + content


def _of_sample(sample: Any, name: str) -> bytes:
    """Return the pixels of a decoded sample; its name where it is no single image."""
    image = sample[0] if isinstance(sample, tuple | list) else sample.get("image") if isinstance(sample, dict) else sample
    if hasattr(image, "tobytes"):
        return repr((getattr(image, "mode", ""), getattr(image, "size", ""))).encode() + image.tobytes()
    return name.encode("utf-8", "surrogateescape")
