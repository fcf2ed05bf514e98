"""How a picture or a clip becomes a model's input, as a value that a saved model carries with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vitarium.errors import InputError, UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@runtime_checkable
class Clip(Protocol):
    """Moving pictures: `len` frames, of which `read_frames` opens those that are asked for (in rising order, some perhaps twice)."""

    def __len__(self) -> int: ...
    def read_frames(self, indices: Sequence[int]) -> list[Image.Image]: ...


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to image_size / crop_pct, crop the centre square, scale to 0..1, normalise.

    Of a clip, first take some frames; each is then treated as a picture.

    Args:
        image_size: side of the square that the model sees, pixels.
        mean, std: a value a channel, on the 0..1 scale; their number is the number of channels (1: grey, 3: RGB).
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the shorter side that the crop keeps, in (0, 1].
        frames: how many frames of a clip the model sees; None: it sees pictures.
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

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def __call__(self, image: Image.Image | Clip | Sequence[Image.Image]) -> Tensor:
        """A picture in any of Pillow's modes -> float32 (channels, image_size, image_size), normalised; a clip, if this has `frames`, a
        `Clip` or a list of pictures -> (channels, frames, image_size, image_size).

        Raises:
            InputError: a clip where a picture is due, or the other way round.
        """
        return self.apply(image, self._still)

    def apply(self, image: Image.Image | Clip | Sequence[Image.Image], still: Callable[[Any], Tensor], start: int | None = None) -> Tensor:
        """As a call, with another way to treat a picture (image -> (channels, h, w)) and another first frame than the middle's."""
        import torch

        given = not hasattr(image, "convert")  # Pillow's images can be converted
        if given and self.frames is None:
            raise InputError("this model sees single pictures, and the data has clips; take a video model ('vitarium models video')")
        if not given and self.frames is not None:
            raise InputError(f"this model sees clips of {self.frames} frames, got a single picture; give it video, or a list of pictures")
        if self.frames is None:
            return still(image)
        indices = self.frame_indices(len(image), start)  # type: ignore[arg-type]
        frames = image.read_frames(indices) if isinstance(image, Clip) else [image[i] for i in indices]  # type: ignore[index]
        return torch.stack([still(frame) for frame in frames], 1)

    def frame_indices(self, count: int, start: int | None = None) -> list[int]:
        """Which of a clip's `count` frames are taken; `start` moves the first one (only with a stride).

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
        """The last frame of a clip of `count` from which all frames that are taken lie inside; 0 where none does."""
        return max(0, count - 1 - ((self.frames or 1) - 1) * (self.stride or 1))

    def _still(self, image: Image.Image) -> Tensor:
        return self.normalised(self.square(to_mode(image, self.channels)))

    def square(self, image: Image.Image) -> Image.Image:
        """The part of a picture (mode "L" or "RGB") that the model sees, image_size x image_size."""
        from torchvision.transforms.v2 import functional as T

        shorter = math.floor(self.image_size / self.crop_pct)
        mode = T.InterpolationMode(self.interpolation)
        return T.center_crop(T.resize(image, [shorter], interpolation=mode, antialias=True), [self.image_size, self.image_size])

    def normalised(self, image: Image.Image) -> Tensor:
        """A picture (mode "L" for one channel, "RGB" for three) as a tensor (channels, h, w) on the model's scale."""
        from torchvision.transforms.v2 import functional as T

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
