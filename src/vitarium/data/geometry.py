"""Geometric transforms in the style of torchvision.transforms.v2: they move images, masks, boxes and keypoints of a sample together.

Random numbers come from torch's global generator. Importing this module imports torchvision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class FitScale(v2.Transform):
    """Scale a sample so that its longer side is `side` pixels, times a random factor.

    As `v2.ScaleJitter`, except that sizes are rounded to the nearest pixel, and masks are sampled at the centres of the new pixels: the
    corner that "nearest" takes would shift them against the image by up to half the factor.

    Args:
        side: length of the longer side in pixels, before the factor.
        factors: (lowest, highest) factor; it is drawn uniformly.
        interpolation: of images: "nearest", "bilinear", "bicubic" or "lanczos".
    """

    def __init__(self, side: int, factors: tuple[float, float] = (1.0, 1.0), interpolation: str = "bilinear"):
        super().__init__()
        self.side, self.factors, self.interpolation = side, factors, v2.InterpolationMode(interpolation)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.factors
        factor = low + (high - low) * torch.rand(()).item()
        return {"size": [max(1, round(length * factor)) for length in fitted(v2.query_size(flat_inputs), self.side)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            values = inpt.as_subclass(Tensor)
            values = values.view(torch.uint8) if values.dtype is torch.bool else values  # otherwise v2 resizes it as float32
            sampled = F.resize_image(values, params["size"], v2.InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(sampled.view(inpt.dtype), like=inpt)
        return self._call_kernel(F.resize, inpt, params["size"], interpolation=self.interpolation, antialias=True)


class CropInside(v2.Transform):
    """Crop a random window of at most `side` x `side` pixels; a side that is not longer than that is kept whole."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        top, left = (int(torch.randint(max(0, length - self.side) + 1, ())) for length in (height, width))
        return {"top": top, "left": left, "height": min(height, self.side), "width": min(width, self.side)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class PadTo(v2.Transform):
    """Pad with zeros at the right and the bottom to `side` x `side` pixels; larger samples are left as they are."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.side - width), max(0, self.side - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.pad, inpt, **params) if any(params["padding"]) else inpt


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size, in the order of `size`, of an image scaled so that its longer side is `side` pixels."""
    longer = max(size)
    return max(1, round(size[0] * side / longer)), max(1, round(size[1] * side / longer))
