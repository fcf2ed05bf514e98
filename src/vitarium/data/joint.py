"""Pictures and their segments, changed together: fitted into a square, scaled, cropped, flipped, and padded to batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.catalog.preprocessing import Preprocessing, to_mode
from vitarium.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segments of a picture of H x W pixels. A pixel that lies in none of them is void: nothing is said of it.

    Args:
        masks: bool (n, H, W). Those of a panoptic or semantic picture do not overlap.
        labels: int64 (n,), class numbers.
        crowd: bool (n,), segments that stand for many things at once and are not learned; None: none.
    """

    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_] | None = None

    @property
    def crowds(self) -> NDArray[np.bool_]:
        """(n,)"""
        return np.zeros(len(self.labels), bool) if self.crowd is None else self.crowd


class FitTransform:
    """Picture and segments -> the picture scaled so that its longer side is image_size, normalised; nothing is cut off.

    In evaluation the segments stay at the picture's own size: answers are measured there. Without segments the target has sizes only.

    Args:
        preprocessing: of the model.
        square: fill the shorter side up with zeros, at the right or the bottom.
    """

    joint = True
    needs_target = False

    def __init__(self, preprocessing: Preprocessing, *, square: bool = False):
        self.preprocessing, self.square = preprocessing, square

    def __call__(self, picture: Image.Image, target: Segmentation | Any) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (channels, h, w) float32, and {"size", "original_size"} (height, width), and of segments {"masks", "labels", "iscrowd"}."""
        import torch

        image = to_mode(picture, self.preprocessing.channels)
        size = _fitted(image.size, self.preprocessing.image_size)
        tensor = normalised(_resized(image, size, self.preprocessing), self.preprocessing)
        found = {"size": torch.tensor(tensor.shape[-2:]), "original_size": torch.tensor((picture.height, picture.width))}
        if self.square:
            tensor = padded(tensor, self.preprocessing.image_size)
        return tensor, found | (as_tensors(target) if isinstance(target, Segmentation) else {})


class JitterTransform:
    """Picture and segments -> both, flipped, scaled by a random factor, cropped where that is too large. For training.

    Args:
        preprocessing: of the model; image_size is the side of the square into which everything must go.
        jitter: range of the factor on the fitted size; (0.1, 2.0) is the usual large-scale jitter, (1, 1) none.
        flip: chance of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation changes.
        square: fill picture and masks up to the square, at the right and the bottom.

    Segments of which fewer than `least` pixels are left do not count, and neither do crowds.
    """

    joint = True
    least = 4

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        jitter: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.0,
        color_jitter: float = 0.0,
        square: bool = False,
    ):
        if not 0 < jitter[0] <= jitter[1]:
            raise UsageError(f"jitter must be a range of factors above 0, got {jitter}")
        self.preprocessing, self.jitter, self.flip, self.square = preprocessing, jitter, flip, square
        self.colours: Any = None
        if color_jitter:
            from torchvision.transforms import v2

            self.colours = v2.ColorJitter(*3 * [color_jitter])

    def __call__(self, picture: Image.Image, target: Segmentation) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (channels, h, w) float32, and {"size", "masks" (n, h, w), "labels", "iscrowd"}."""
        import torch

        side = self.preprocessing.image_size
        image, masks = to_mode(picture, self.preprocessing.channels), target.masks
        if self.flip and random.random() < self.flip:
            from PIL import Image

            image, masks = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), masks[..., ::-1]
        factor = random.uniform(*self.jitter)
        width, height = (max(1, round(length * factor)) for length in _fitted(image.size, side))
        image, masks = _resized(image, (width, height), self.preprocessing), resize_masks(masks, (height, width))
        left, top = random.randint(0, max(0, width - side)), random.randint(0, max(0, height - side))
        if width > side or height > side:
            image = image.crop((left, top, min(width, left + side), min(height, top + side)))
            masks = masks[:, top : top + side, left : left + side]
        if self.colours:
            image = self.colours(image)
        tensor = normalised(image, self.preprocessing)
        kept = ~target.crowds & (masks.sum((1, 2)) >= self.least)
        found = as_tensors(Segmentation(masks[kept], target.labels[kept])) | {"size": torch.tensor(tensor.shape[-2:])}
        if self.square:
            tensor, found["masks"] = padded(tensor, side), padded(found["masks"], side)
        return tensor, found


def as_tensors(target: Segmentation) -> dict[str, Tensor]:
    """masks (n, H, W) bool, labels (n,) int64, iscrowd (n,) bool."""
    import torch

    masks, labels = np.ascontiguousarray(target.masks), np.ascontiguousarray(target.labels, dtype=np.int64)
    return {"masks": torch.from_numpy(masks), "labels": torch.from_numpy(labels), "iscrowd": torch.from_numpy(target.crowds.copy())}


def resize_masks(masks: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(n, H, W) -> (n, *size), each cell from the pixel at its middle."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(size, masks.shape[1:], strict=True))
    return masks[:, rows[:, None], columns]


def normalised(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """A picture of the right mode and size -> float32 (channels, height, width) by the preprocessing's mean and std."""
    import torch

    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
    mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return pixels.float().sub_(mean).div_(std)


def padded(x: Tensor, side: int) -> Tensor:
    """(C, h, w) -> (C, side, side), zeros (or False) at the right and the bottom."""
    if tuple(x.shape[-2:]) == (side, side):
        return x
    filled = x.new_zeros(*x.shape[:-2], side, side)
    filled[..., : x.shape[-2], : x.shape[-1]] = x
    return filled


def pad_batch(images: Sequence[Tensor], *, multiple: int = 1, size: int | None = None, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pictures of any sizes in one tensor, each at the upper left.

    Args:
        images: (C, h, w) each.
        multiple: height and width are the largest ones, rounded up to one.
        size: least height and width.
        value: of what is added.

    Returns:
        (B, C, H, W), and bool (B, H, W), True where padding is.
    """
    import torch

    height, width = (max(size or 1, *(-(-image.shape[axis] // multiple) * multiple for image in images)) for axis in (-2, -1))
    batch = images[0].new_full((len(images), images[0].shape[0], height, width), value)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[-2], : image.shape[-1]] = image
        padding[i, : image.shape[-2], : image.shape[-1]] = False
    return batch, padding


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side becomes `side`."""
    longer = max(size)
    return max(1, round(size[0] * side / longer)), max(1, round(size[1] * side / longer))


def _resized(image: Image.Image, size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    from PIL import Image

    return image if image.size == size else image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
