"""How a picture becomes a model's input, as a value that a saved model carries with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vitarium.errors import UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to image_size / crop_pct, crop the centre square, scale to 0..1, normalise.

    Args:
        image_size: side of the square that the model sees, pixels.
        mean, std: a value a channel, on the 0..1 scale; their number is the number of channels (1: grey, 3: RGB).
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the shorter side that the crop keeps, in (0, 1].

    Raises:
        UsageError: a value out of range.
    """

    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.image_size < 1:
            raise UsageError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        if self.interpolation not in INTERPOLATIONS:
            hint = nearest(self.interpolation, INTERPOLATIONS)
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}{hint}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise UsageError(f"mean and std need 1 or 3 values each, std above 0; got mean={self.mean}, std={self.std}")

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture in any of Pillow's modes -> float32 (channels, image_size, image_size), normalised."""
        from torchvision.transforms.v2 import functional as T

        image = to_mode(image, self.channels)
        shorter = math.floor(self.image_size / self.crop_pct)
        mode = T.InterpolationMode(self.interpolation)
        image = T.center_crop(T.resize(image, [shorter], interpolation=mode, antialias=True), [self.image_size, self.image_size])
        return T.normalize(T.to_dtype(T.to_image(image), scale=True), list(self.mean), list(self.std))

    def to_dict(self) -> dict[str, Any]:
        """For a file's header; `Preprocessing(**d)` gives it back."""
        return asdict(self)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Any of Pillow's modes -> "L" (channels 1) or "RGB" (3). 16-bit grey keeps its relative brightness; alpha is laid over white."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 255.0 if image.mode == "F" and values.max(initial=0) > 1 else 1.0 if image.mode == "F" else 65535.0
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # Pillow knows no direct way from some of its modes (LAB) to grey
    return image.convert("L" if channels == 1 else "RGB")
