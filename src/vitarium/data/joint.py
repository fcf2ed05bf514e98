"""Joint transforms: an image and its masks, boxes and keypoints are scaled, cropped, flipped and padded together.

The geometry is that of torchvision.transforms.v2: a target holds `tv_tensors` (Mask, BoundingBoxes, KeyPoints), which are transformed with
the image. Random numbers come from torch's global generator, which the loader seeds by (seed, epoch, index): see `vitarium.data.loader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The segments of an image of H x W pixels. Pixels outside all segments are void: they have no label.

    Args:
        masks: bool (n, H, W). In panoptic and semantic data they do not overlap.
        labels: int64 (n,), class numbers.
        crowd: bool (n,), True for a segment that covers many objects at once and is not trained on; None: no such segment.
    """

    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_] | None = None

    @property
    def crowds(self) -> NDArray[np.bool_]:
        """Return `crowd`, (n,); all False if it is None."""
        return np.zeros(len(self.labels), bool) if self.crowd is None else self.crowd


Target = Segmentation | Mapping[str, Any]
"""The labels of an image: segments, or tensors by name with one row per object. `tv_tensors` are transformed with the image."""


class FitTransform:
    """Scale an image so that its longer side is image_size, and normalise it; nothing is cropped.

    For evaluation: the target keeps the image's own size, at which metrics are computed. Anything but a `Target` counts as no target.

    Args:
        preprocessing: of the model.
        square: whether to pad the shorter side with zeros, at the right or the bottom, to image_size.
    """

    joint = True
    needs_target = False

    def __init__(self, preprocessing: Preprocessing, *, square: bool = False):
        self.preprocessing, self.square = preprocessing, square

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform one sample.

        Args:
            image: any size and mode.
            target: `Target` or anything else.

        Returns:
            float32 (channels, h, w), and {"size", "original_size"} (height, width), with "masks", "labels", "iscrowd" of a `Segmentation`,
            or the entries of a mapping.
        """
        import torch

        from vitarium.data.geometry import FitScale, PadTo

        side, original = self.preprocessing.image_size, (image.height, image.width)
        image = FitScale(side, interpolation=self.preprocessing.interpolation)(to_mode(image, self.preprocessing.channels))
        tensor = self.preprocessing.normalised(image)
        size = {"size": torch.tensor(tensor.shape[-2:]), "original_size": torch.tensor(original)}
        tensor = PadTo(side)(tensor) if self.square else tensor
        known = isinstance(target, Segmentation | Mapping)
        return tensor.as_subclass(torch.Tensor), (_plain(as_tensors(target)) if known else {}) | size


class JitterTransform:
    """Flip, scale and crop an image and its target at random, for training.

    Args:
        preprocessing: of the model; image_size is the side of the square that the result fits into.
        jitter: range of the factor on the fitted size; (0.1, 2.0) is the usual large-scale jitter, (1, 1) none.
        flip: probability of a horizontal flip.
        color_jitter: strength of the changes of brightness, contrast and saturation.
        square: whether to pad image and masks to the square, at the right and the bottom.

    Crowds are left out, and so are objects with fewer than `least` pixels left (of the mask, or else of the box).
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
        from torchvision.transforms import v2

        from vitarium.data.geometry import CropInside, FitScale

        side = preprocessing.image_size
        self.preprocessing, self.square = preprocessing, square
        self.vary = v2.Compose(
            [
                v2.RandomHorizontalFlip(flip),
                FitScale(side, jitter, preprocessing.interpolation),
                CropInside(side),
                v2.ClampBoundingBoxes(),
                *([v2.ColorJitter(*3 * [color_jitter])] if color_jitter else []),
            ]
        )

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform one sample.

        Args:
            image: any size and mode.
            target: its objects.

        Returns:
            float32 (channels, h, w), and the target's tensors with "size" (height, width), such as {"masks" (n, h, w), "labels",
            "iscrowd", "size"}.
        """
        import torch

        from vitarium.data.geometry import PadTo

        image, found = self.vary(to_mode(image, self.preprocessing.channels), as_tensors(target))
        kept = self._kept(found)
        tensor, found = self.preprocessing.normalised(image), {name: _rows(value, kept) for name, value in found.items()}
        size = torch.tensor(tensor.shape[-2:])
        if self.square:
            tensor, found = PadTo(self.preprocessing.image_size)(tensor, found)
        return tensor.as_subclass(torch.Tensor), _plain(found) | {"size": size}

    def _kept(self, target: dict[str, Any]) -> Tensor:
        """Return which objects remain, (n,) bool."""
        if "masks" in target:
            pixels = target["masks"].sum((1, 2))
        else:
            left, top, right, lower = target["boxes"].unbind(-1)
            pixels = (right - left) * (lower - top)
        kept = pixels >= self.least
        return kept & ~target["iscrowd"] if "iscrowd" in target else kept


def as_tensors(target: Target) -> dict[str, Any]:
    """Return a target as tensors by name: of a `Segmentation`, a Mask "masks" (n, H, W) bool, "labels" (n,) int64 and "iscrowd" (n,) bool.

    Raises:
        UsageError: a mapping with neither "masks" nor "boxes", or with boxes that are not (x1, y1, x2, y2).
    """
    import torch
    from torchvision import tv_tensors

    if isinstance(target, Segmentation):
        masks, labels = np.ascontiguousarray(target.masks), np.ascontiguousarray(target.labels, dtype=np.int64)
        crowd = torch.from_numpy(target.crowds.copy())
        return {"masks": tv_tensors.Mask(torch.from_numpy(masks)), "labels": torch.from_numpy(labels), "iscrowd": crowd}
    boxes = target.get("boxes")
    if "masks" not in target and boxes is None:
        raise UsageError(f"a target needs masks or boxes, got {', '.join(target) or 'nothing'}")
    if boxes is not None and getattr(boxes, "format", None) != tv_tensors.BoundingBoxFormat.XYXY:
        raise UsageError("boxes must be tv_tensors.BoundingBoxes of the format XYXY")
    return dict(target)


def _rows(value: Any, kept: Tensor) -> Any:
    """Select the rows of the kept objects; a tv_tensor keeps its type."""
    from torchvision import tv_tensors

    return tv_tensors.wrap(value[kept], like=value) if isinstance(value, tv_tensors.TVTensor) else value[kept]


def _plain(target: dict[str, Any]) -> dict[str, Tensor]:
    from torchvision.transforms import v2

    return v2.ToPureTensor()(target)


def pad_batch(images: Sequence[Tensor], *, multiple: int = 1, size: int | None = None, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pad images of any sizes at the right and the bottom, and stack them.

    Args:
        images: (C, h, w) each.
        multiple: height and width of the batch are the largest of its images, rounded up to a multiple of this.
        size: least height and width of the batch.
        value: of the padding.

    Returns:
        the batch (B, C, H, W), and a mask (B, H, W) bool, True at the padding.
    """
    import torch

    height, width = (max(size or 1, *(-(-image.shape[axis] // multiple) * multiple for image in images)) for axis in (-2, -1))
    batch = images[0].new_full((len(images), images[0].shape[0], height, width), value)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[-2], : image.shape[-1]] = image
        padding[i, : image.shape[-2], : image.shape[-1]] = False
    return batch, padding
