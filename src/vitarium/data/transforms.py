"""Training augmentation: random crops, flips, policies and erasing, by name, from torchvision and timm.

All geometry is done in one resampling by Pillow, so that small images cost little more than their conversion to a tensor.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vitarium.catalog.preprocessing import Preprocessing, to_mode
from vitarium.data.loader import seed_generators
from vitarium.errors import UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]
Box = tuple[float, float, float, float]
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
MOST_LAYERS = 64
"""Largest number of operations that a policy applies to an image; published ones have 2 or 3."""


class Augment(BaseModel):
    """Augmentation settings; the default equals the transform of evaluation.

    Args:
        scale: range of the share of the area that a random crop keeps; None: a centre crop.
        ratio: range of the crop's aspect ratio.
        flip: probability of a horizontal flip.
        policy: name of a policy in timm's form, such as "rand-m9-mstd0.5-inc1" (RandAugment), "augmix-m3-w3", "3a" (DeiT-III's).
        color_jitter: strength of brightness, contrast and saturation changes; ignored with a policy.
        erase: probability of random erasing.
        pad_crop: pixels of reflection padding before a random crop of the full size (for small images).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scale: tuple[Share, Share] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.0
    policy: str | None = None
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    erase: Share = 0.0
    pad_crop: Annotated[int, Field(ge=0)] = 0

    @field_validator("scale", "ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("must be a range from a number above 0 to one that is not smaller")
        return value

    @field_validator("policy")
    @classmethod
    def _exists(cls, name: str | None) -> str | None:
        if name is not None:
            _policy(name, Preprocessing())
        return name


class TrainTransform:
    """Augment an image to float32 (channels, image_size, image_size), normalised. Uses Python's, NumPy's and torch's global generators.

    A clip becomes (channels, frames, image_size, image_size): it starts at a random frame, and all frames get the same augmentation.
    """

    def __init__(self, preprocessing: Preprocessing, augment: Augment):
        from PIL import Image
        from torchvision.transforms import v2

        self.preprocessing, self.augment = preprocessing, augment
        self.resampling = Image.Resampling[preprocessing.interpolation.upper()]
        self.colours: Callable[[Image.Image], Image.Image] | None = None
        if augment.policy:
            self.colours = _policy(augment.policy, preprocessing)
        elif augment.color_jitter:
            self.colours = v2.ColorJitter(*3 * [augment.color_jitter])
        self.finish = _Finish(preprocessing, augment.erase)

    def __call__(self, image: Any) -> Tensor:
        preprocessing = self.preprocessing
        if preprocessing.frames is None or not hasattr(image, "__len__"):
            return preprocessing.apply(image, self._still)
        start = random.randint(0, preprocessing.last_start(len(image))) if preprocessing.stride else None
        key = random.getrandbits(63)

        def alike(frame: Image.Image) -> Tensor:
            seed_generators(key)
            return self._still(frame)

        return preprocessing.apply(image, alike, start)

    def _still(self, image: Image.Image) -> Tensor:
        from PIL import Image

        size = self.preprocessing.image_size
        image = to_mode(image, self.preprocessing.channels)
        image = image.resize((size, size), self.resampling, box=self._box(image))
        if self.augment.pad_crop:
            image = _shift(image, self.augment.pad_crop)
        if self.augment.flip and random.random() < self.augment.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.finish(self.colours(image) if self.colours else image)

    def _box(self, image: Image.Image) -> Box:
        """Return the crop of the image: left, top, right, bottom."""
        if self.augment.scale is None:
            side = self.preprocessing.crop_pct * min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            return left, top, left + side, top + side
        return random_box(image.width, image.height, self.augment.scale, self.augment.ratio)


def random_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Return a random crop of an image: left, top, right, bottom.

    It is torchvision's `RandomResizedCrop.get_params`, with the same numbers from torch's global generator, at half its time.

    Args:
        width, height: of the image, pixels.
        scale, ratio: ranges of the crop's share of the area, and of its aspect ratio.
    """
    import torch

    low, high = _log_ratio(ratio)
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale).item()
        aspect = torch.empty(1).uniform_(low, high).exp_().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return left, top, left + w, top + h
    w = min(width, round(height * max(ratio)))  # the largest part in the middle whose aspect ratio is within the range
    h = min(height, round(w / min(ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@functools.cache
def _log_ratio(ratio: tuple[float, float]) -> tuple[float, float]:
    """Return the logarithms of both ends in torch's float32."""
    import torch

    low, high = torch.log(torch.tensor(ratio)).tolist()
    return low, high


class _Finish:
    """Convert an image of the final size to a normalised tensor, with an erased rectangle if drawn."""

    def __init__(self, preprocessing: Preprocessing, erase: float):
        import torch

        # as arrays: on one small image NumPy's calls take a third of the time of torch's, and give the same float32
        self.mean, self.std = ((255 * torch.tensor(values)).numpy() for values in (preprocessing.mean, preprocessing.std))
        self.erase: Callable[[Tensor], Tensor] | None = None
        if erase:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(erase, mode="pixel", device="cpu")

    def __call__(self, image: Image.Image) -> Tensor:
        import numpy as np
        import torch

        values = np.array(image, dtype=np.float32).reshape(image.height, image.width, -1)
        values -= self.mean
        values /= self.std
        tensor = torch.from_numpy(values).permute(2, 0, 1)
        return self.erase(tensor) if self.erase else tensor


def train_transform(preprocessing: Preprocessing, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """Return the training transform for a model's preprocessing; without augmentation the preprocessing itself.

    Raises:
        UsageError: unknown policy; the message names similar ones.
    """
    return preprocessing if augment == Augment() else TrainTransform(preprocessing, augment)


def _shift(image: Image.Image, most: int) -> Image.Image:
    """Shift an image by up to `most` pixels in each direction, with reflection at the border."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image)
    most = min(most, *(side - 1 for side in image.size))
    down, across = random.randint(-most, most), random.randint(-most, most)
    rows, columns = (_reflected(np.arange(side) + shift, side) for side, shift in zip(pixels.shape, (down, across), strict=False))
    return Image.fromarray(pixels[rows[:, None], columns])


def _reflected(places: Any, side: int) -> Any:
    places = abs(places)
    return side - 1 - abs(side - 1 - places)


def _policy(name: str, preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    kind = name.partition("-")[0]
    if kind not in POLICIES:
        raise UsageError(f"unknown augmentation policy {name!r}{nearest(kind, POLICIES)} (kinds: {', '.join(POLICIES)})")
    from timm.data import auto_augment
    from torchvision.transforms import v2

    mean = tuple(round(255 * m) for m in preprocessing.mean)
    hints = dict(translate_const=int(preprocessing.image_size * 0.45), img_mean=mean)
    sections = name.split("-")[1:]
    if kind != "3a" and (ignored := [s for s in sections if not re.fullmatch(r"[a-z]+[\d.]+|t\w+", s)]):  # timm ignores these
        raise UsageError(f"augmentation policy {name!r}: {ignored[0]!r} is not in timm's form, such as 'rand-m9-mstd0.5-inc1'")
    if excess := [s for s in sections if (count := re.fullmatch(r"[nwd](\d+)", s)) and int(count[1]) > MOST_LAYERS]:
        counts = "n (operations), w and d (width and depth of augmix)"
        raise UsageError(f"augmentation policy {name!r}: {excess[0]!r} is out of range; {counts} are at most {MOST_LAYERS}")
    try:
        if kind == "rand":
            return _posterising(auto_augment.rand_augment_transform(name, hints))
        if kind == "augmix":
            return _posterising(auto_augment.augment_and_mix_transform(name, hints))
        if kind == "3a":
            one = [v2.Grayscale(preprocessing.channels), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(5, (0.1, 2.0))]
            return v2.Compose([v2.RandomChoice(one), v2.ColorJitter(0.3, 0.3, 0.3)])
        return _posterising(auto_augment.auto_augment_transform(name, hints))
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(f"augmentation policy {name!r} is not in timm's form, such as 'rand-m9-mstd0.5-inc1': {error}") from error


def _posterising(transform: Any) -> Callable[[Image.Image], Image.Image]:
    """Limit timm's strongest posterising, 0 bits, to 1 bit: Pillow refuses 0 since version 13."""
    ops = getattr(transform, "ops", None) or [op for pair in transform.policy for op in pair]
    for op in ops:
        if op.name.startswith("Posterize"):
            op.level_fn = functools.partial(_at_least_one_bit, op.level_fn)
    return transform


def _at_least_one_bit(level_fn: Callable[..., tuple[int, ...]], level: float, hints: dict[str, Any]) -> tuple[int, ...]:
    return tuple(max(1, bits) for bits in level_fn(level, hints))
