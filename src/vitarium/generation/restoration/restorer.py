"""Base class of networks for image restoration: input of any size, output `scale` times as large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitarium.catalog.calling import random_uniform
from vitarium.nn.inputs import check_image

DEFAULT_SIZE = 64
"""Side of an example image if the variant has no size, pixels."""


class Restorer(nn.Module):
    """Restore images (B, in_chans, H, W) in 0..1, any H and W: (B, in_chans, scale H, scale W), about 0..1, not clipped.

    Subclasses define `restore`. Its input is reflected at the bottom and the right up to the next multiple of `multiple`, and the result is
    cropped.

    Args:
        scale: factor of enlargement on each axis (1 for a denoiser).
        in_chans: number of channels of input and output.
        multiple: both sides of the input of `restore` are multiples of this, pixels.
        reach: radius of the receptive field in pixels of the input. If a tile's overlap exceeds it, an image restored in tiles equals one
            restored as a whole.
    """

    def __init__(self, *, scale: int, in_chans: int, multiple: int = 1, reach: int = 0):
        super().__init__()
        self.scale, self.in_chans, self.multiple, self.reach = scale, in_chans, multiple, reach

    def restore(self, image: Tensor) -> Tensor:
        """Restore images (B, in_chans, H, W) with sides that are multiples of `multiple`: (B, in_chans, scale H, scale W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define restore")

    def forward(self, image: Tensor) -> Tensor:
        self.check_image(image)
        height, width = image.shape[-2:]
        restored = self.restore(reflect_to_multiple(image, self.multiple))
        return restored[..., : height * self.scale, : width * self.scale]

    def example_inputs(self, n: int = 1, image_size: int | tuple[int, int] | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Return image (n, in_chans, H, W) in 0..1; by default of the variant's size."""
        own = getattr(getattr(self, "preprocessing", None), "image_size", DEFAULT_SIZE)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or (own, own)
        return {"image": random_uniform(self, (n, self.in_chans, height, width), seed=seed)}

    def check_image(self, image: Tensor) -> None:
        """Check the input.

        Raises:
            InputError: wrong rank, channels, layout, dtype or device, or an empty image; the message has the actual and the accepted value.
        """
        check_image(self, image, self.in_chans, note=" in 0..1")


def reflect_to_multiple(image: Tensor, size: int) -> Tensor:
    """Reflect at the bottom and the right, without repeating the edge, until both sides are multiples of `size`.

    (B, C, H, W) -> (B, C, H', W'). A side shorter than its padding is reflected more than once; one pixel is repeated.
    """
    for axis in (-2, -1):
        side = image.shape[axis]
        if side % size:
            places = torch.arange(side + -side % size, device=image.device) % max(1, 2 * side - 2)
            image = image.index_select(axis, torch.minimum(places, 2 * side - 2 - places).clamp_(min=0))
    return image
