"""Preprocessing of an image or a clip into a model's input; it is part of a saved model."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vitarium.errors import InputError, UsageError, nearest

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BRIGHTNESS = (
    "accepted: 8 or 16 bits per channel, or floating-point values from 0 (black) to 1 (white); scale the images and save them again"
)
"""Accepted values of images, for messages."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
LARGEST_SIDE = 2**14
"""Longest side of an input and of the image that is resized for it, pixels."""
LARGEST_INPUT = 2**30
"""Largest number of values of an input, all frames and channels together (4 GiB)."""


@runtime_checkable
class Clip(Protocol):
    """A video of `len` frames; `read_frames` opens the requested ones (ascending, possibly with repeats)."""

    def __len__(self) -> int: ...
    def read_frames(self, indices: Sequence[int]) -> list[Image.Image]: ...


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to image_size / crop_pct, crop the centre square, scale to 0..1, normalise.

    From a clip, frames are chosen first; each is then treated as an image.

    Args:
        image_size: side of the square input, pixels; image_size / crop_pct is at most `LARGEST_SIDE`.
        mean, std: one value per channel, on the 0..1 scale; their number is the number of channels (1: grey, 3: RGB).
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the shorter side that the crop keeps, in (0, 1].
        frames: number of frames of a clip that the model takes; None: it takes images.
        stride: step between them, in frames of the clip, taken from its middle (the last frame is repeated where the clip is too short);
            None: they are spread evenly over the whole clip.

    Raises:
        UsageError: a value out of range.
    """

    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    frames: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.image_size < 1:
            raise UsageError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        for name, value in (("frames", self.frames), ("stride", self.stride)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.interpolation not in INTERPOLATIONS:
            hint = nearest(self.interpolation, INTERPOLATIONS)
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}{hint}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise UsageError(f"mean and std need 1 or 3 values each, std above 0; got mean={self.mean}, std={self.std}")
        self._check_size()

    def _check_types(self) -> None:
        for name in ("image_size", "frames", "stride"):
            value = getattr(self, name)
            optional = name != "image_size"
            if not (isinstance(value, numbers.Integral) and not isinstance(value, bool)) and not (optional and value is None):
                raise UsageError(f"{name} must be a whole number{' or None' if optional else ''}, got {value!r}")
        if not is_finite(self.crop_pct):
            raise UsageError(f"crop_pct must be a number, got {self.crop_pct!r}")
        if not isinstance(self.interpolation, str):
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(map(is_finite, values)):
                raise UsageError(f"{name} must be a list of 1 or 3 numbers, got {values!r}")

    def _check_size(self) -> None:
        if self.image_size / self.crop_pct > LARGEST_SIDE:
            got = f"image_size={self.image_size:,}, crop_pct={self.crop_pct}"
            raise UsageError(f"image_size / crop_pct must be at most {LARGEST_SIDE:,} pixels, got {got}")
        values = (self.frames or 1) * len(self.mean) * self.image_size**2
        if values > LARGEST_INPUT or (self.stride or 1) > LARGEST_INPUT:
            raise UsageError(
                f"an input may hold {LARGEST_INPUT:,} values (frames x channels x image_size^2), and a stride be at most as large; got "
                f"image_size={self.image_size:,}, frames={self.frames}, stride={self.stride}"
            )

    @property
    def channels(self) -> int:
        """Number of channels: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def __call__(self, image: Image.Image | Clip | Sequence[Image.Image]) -> Tensor:
        """Return an image in any of Pillow's modes as float32 (channels, image_size, image_size), normalised; with `frames`, a `Clip` or a
        list of images as (channels, frames, image_size, image_size).

        Raises:
            InputError: a clip where an image is expected, or the other way round.
        """
        return self.apply(image, self._still)

    def apply(self, image: Image.Image | Clip | Sequence[Image.Image], still: Callable[[Any], Tensor], start: int | None = None) -> Tensor:
        """Preprocess like a call, with a given function for one image (image -> (channels, h, w)) and a given first frame."""
        import torch

        given = not hasattr(image, "convert")  # Pillow's images can be converted
        if given and self.frames is None:
            raise InputError("this model takes single images, and the data has clips; take a video model ('vitarium models video')")
        if not given and self.frames is not None:
            raise InputError(f"this model takes clips of {self.frames} frames, got a single image; give it video, or a list of images")
        if self.frames is None:
            return still(image)
        indices = self.frame_indices(len(image), start)  # type: ignore[arg-type]
        frames = image.read_frames(indices) if isinstance(image, Clip) else [image[i] for i in indices]  # type: ignore[index]
        return torch.stack([still(frame) for frame in frames], 1)

    def frame_indices(self, count: int, start: int | None = None) -> list[int]:
        """Return the indices of the frames taken from a clip of `count`; `start` moves the first one (only with a stride).

        Raises:
            InputError: a clip without frames.
        """
        if count < 1:
            raise InputError("the clip holds no frames")
        wanted = self.frames or 1
        if self.stride is None:
            return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
        first = self.last_start(count) // 2 if start is None else start
        return [min(first + i * self.stride, count - 1) for i in range(wanted)]

    def last_start(self, count: int) -> int:
        """Return the largest index of a first frame for which all frames lie inside a clip of `count`; 0 if there is none."""
        return max(0, count - 1 - ((self.frames or 1) - 1) * (self.stride or 1))

    def _still(self, image: Image.Image) -> Tensor:
        return self.normalised(self.square(to_mode(image, self.channels)))

    def square(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image (mode "L" or "RGB") to image_size x image_size, as torchvision's `resize` and `center_crop` do."""
        from PIL import Image

        side, shorter = self.image_size, math.floor(self.image_size / self.crop_pct)
        (width, height), least = image.size, min(image.size)
        wanted = (int(shorter * width / least), shorter) if height == least else (shorter, int(shorter * height / least))
        if wanted != image.size:
            image = image.resize(wanted, Image.Resampling[self.interpolation.upper()])
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))

    def array(self, image: Image.Image) -> np.ndarray:
        """Return an image in any of Pillow's modes as a normalised array (channels, image_size, image_size), float32. Imports no torch."""
        return self._normalised(self.square(to_mode(image, self.channels)))

    def normalised(self, image: Image.Image) -> Tensor:
        """Return an image (mode "L" for one channel, "RGB" for three) as a normalised tensor (channels, h, w).

        It equals torchvision's `to_image`, `to_dtype(scale=True)` and `normalize`, whose calls take longer than the work on small images.
        """
        import torch

        return torch.from_numpy(self._normalised(image))

    def _normalised(self, image: Image.Image) -> np.ndarray:
        import numpy as np

        values = np.array(image, dtype=np.float32).reshape(image.height, image.width, -1)
        values *= np.float32(1 / 255)
        values -= np.asarray(self.mean, dtype=np.float32)
        values /= np.asarray(self.std, dtype=np.float32)
        return values.transpose(2, 0, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for a file's header; `Preprocessing(**d)` restores them."""
        return asdict(self)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number (no bool)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_brightness(image: Image.Image) -> None:
    """Check the values of an image of mode "F" or "I": one rule for all images, so that those of a data set are read alike.

    Raises:
        InputError: floating-point values that are not finite or not in [0, 1], or whole numbers that are not 16-bit ones.
    """
    import numpy as np

    values, top = np.asarray(image), 1 if image.mode == "F" else 65535
    if image.mode == "F" and not np.isfinite(values).all():
        raise InputError(f"{(~np.isfinite(values)).sum():,} of its values are NaN or infinite; replace them; {BRIGHTNESS}")
    if values.size and (values.min() < 0 or values.max() > top):
        raise InputError(f"values from {values.min():g} to {values.max():g}; {BRIGHTNESS}")


STRIP = 4_000_000
"""Pixels that are converted at a time, so that a large image needs little more memory than itself and its result."""


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert any of Pillow's modes to "L" (channels 1) or "RGB" (3). 16-bit grey keeps its brightness; alpha is blended over white.

    An image of that mode is returned itself.

    Raises:
        InputError: see `check_brightness`.
    """
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        check_brightness(image)
    rows = max(1, STRIP // max(1, image.width))
    if image.height <= rows:
        return _converted(image, mode)
    found = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        found.paste(_converted(image.crop((0, top, image.width, min(top + rows, image.height))), mode), (0, top))
    return found


def _converted(image: Image.Image, mode: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values, top = np.asarray(image, dtype=np.float64), 1.0 if image.mode == "F" else 65535.0
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # Pillow has no direct conversion from some modes (LAB) to grey
    return image.convert(mode)
