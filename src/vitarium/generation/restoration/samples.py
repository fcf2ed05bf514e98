"""Training and evaluation samples of image restoration, from pairs of images or from high-resolution images alone."""

from __future__ import annotations

import random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitarium.generation.restoration.tiling import to_bytes, to_tensor
from vitarium.ops.bicubic import resize_bicubic


class PairTransform:
    """Convert (low, high) images to (low, high) tensors.

    In training both are float32 in 0..1: a random crop of the low-resolution image and the same part of the high-resolution one, flipped
    and transposed at random; smaller images are mirrored up to the crop. For evaluation both are whole and uint8, the high-resolution
    image cropped to `scale` times the other.

    If the partner is None, the image is the high-resolution one, and the low-resolution one is computed from it. If it is not an image (a
    class number), the image is a low-resolution one without ground truth, which is then an empty tensor.

    Args:
        scale: side of the high-resolution image over that of the low-resolution one.
        channels: of both, 3 or 1.
        crop: side of a training crop in pixels of the low-resolution image; None for evaluation.
        flip: probability of each of the two flips and of the transposition.
    """

    joint = True
    needs_target = False

    def __init__(self, scale: int, channels: int = 3, *, crop: int | None = None, flip: float = 0.0):
        self.scale, self.channels, self.crop, self.flip = scale, channels, crop, flip

    def __call__(self, image: Image.Image, partner: Any) -> tuple[Tensor, Tensor]:
        first = to_tensor(image, self.channels)
        if partner is not None and not isinstance(partner, Image.Image):
            return first, torch.empty(self.channels, 0, 0, dtype=torch.uint8)
        if self.crop is None:
            return self._whole(first, partner)
        low, high = self._cropped_high(first) if partner is None else self._cropped_pair(first, to_tensor(partner, self.channels))
        return self._varied(low, high)

    def _whole(self, first: Tensor, partner: Image.Image | None) -> tuple[Tensor, Tensor]:
        if partner is None:
            high = mirrored(first, self.scale)
            high = high[:, : high.shape[1] // self.scale * self.scale, : high.shape[2] // self.scale * self.scale]
            return shrunk(high, self.scale), high
        high = to_tensor(partner, self.channels)
        return first, high[:, : first.shape[1] * self.scale, : first.shape[2] * self.scale]

    def _cropped_pair(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        crop, scale = self.crop or 0, self.scale
        low, high = mirrored(low, crop), mirrored(high, crop * scale)
        top, left = (random.randint(0, side - crop) for side in low.shape[1:])
        low = low[:, top : top + crop, left : left + crop]
        return low, high[:, top * scale :, left * scale :][:, : crop * scale, : crop * scale]

    def _cropped_high(self, high: Tensor) -> tuple[Tensor, Tensor]:
        """Crop with a margin of the kernel's size, then shrink: the result equals that of shrinking the whole image and cropping it."""
        crop, scale = self.crop or 0, self.scale
        high = mirrored(high, crop * scale)
        top, left = (random.randint(0, side // scale - crop) for side in high.shape[1:])
        above, before = min(top, 2), min(left, 2)  # the kernel extends over two pixels of the low-resolution image
        around = high[:, (top - above) * scale : (top + crop + 2) * scale, (left - before) * scale : (left + crop + 2) * scale]
        low = shrunk(around, scale)[:, above : above + crop, before : before + crop]
        return low, high[:, top * scale : (top + crop) * scale, left * scale : (left + crop) * scale]

    def _varied(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in (1, 2) if random.random() < self.flip]
        low, high = low.flip(axes), high.flip(axes)
        if random.random() < self.flip:
            low, high = low.transpose(1, 2), high.transpose(1, 2)
        return low.float() / 255, high.float() / 255


def shrunk(high: Tensor, scale: int) -> Tensor:
    """Shrink by bicubic interpolation in 8 bits, as the benchmarks do: (C, H, W) uint8 -> (C, ceil(H / scale), ceil(W / scale)) uint8."""
    return _by_channel(high, 1 / scale)


def enlarged(low: Tensor, scale: int) -> Tensor:
    """Enlarge by bicubic interpolation in 8 bits, the baseline of restoration: (C, H, W) uint8 -> (C, scale H, scale W) uint8."""
    return _by_channel(low, scale)


def _by_channel(image: Tensor, scale: float) -> Tensor:
    """Resize in 8 bits, one channel after the other, because floating-point copies of a whole photograph need gigabytes."""
    return torch.stack([to_bytes(resize_bicubic(channel.float() / 255, scale)) for channel in image])


def mirrored(image: Tensor, least: int) -> Tensor:
    """Mirror at the bottom and the right, edge repeated, until both sides have `least` pixels: (C, H, W) -> (C, H', W')."""
    for axis in (1, 2):
        side = image.shape[axis]
        if side < least:
            places = torch.arange(least) % (2 * side)
            image = image.index_select(axis, torch.minimum(places, 2 * side - 1 - places))
    return image
