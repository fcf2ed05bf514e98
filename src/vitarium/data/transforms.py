"""How a picture is varied in training: the field's usual augmentations, by name, on torchvision's and timm's implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from vitarium.catalog.preprocessing import Preprocessing, to_mode
from vitarium.errors import UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")


class Augment(BaseModel):
    """What training does to a picture; the default does nothing but resize.

    Args:
        scale: range of the share of the area that a random crop keeps; None crops the centre.
        ratio: range of the crop's aspect ratio.
        flip: chance of a horizontal flip.
        policy: timm's name of a policy, such as "rand-m9-mstd0.5-inc1" (RandAugment), "augmix-m3-w3", "3a" (DeiT-III's).
        color_jitter: strength of brightness, contrast and saturation changes; without a policy only.
        erase: chance of random erasing.
        pad_crop: pixels of reflection at the border before a random crop of the full size (small pictures).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: tuple[Share, Share] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.0
    policy: str | None = None
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    erase: Share = 0.0
    pad_crop: Annotated[int, Field(ge=0)] = 0


class TrainTransform:
    """Picture -> float32 (channels, image_size, image_size), normalised. Draws from the global random generators."""

    def __init__(self, preprocessing: Preprocessing, augment: Augment):
        from torchvision.transforms import v2

        self.preprocessing = preprocessing
        size, mode = preprocessing.image_size, v2.InterpolationMode(preprocessing.interpolation)
        steps: list[Any] = []
        if augment.scale is not None:
            steps.append(v2.RandomResizedCrop(size, augment.scale, augment.ratio, interpolation=mode, antialias=True))
        else:
            steps += [v2.Resize(size, interpolation=mode, antialias=True), v2.CenterCrop(size)]
        if augment.pad_crop:
            steps.append(v2.RandomCrop(size, padding=augment.pad_crop, padding_mode="reflect"))
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.policy:
            steps.append(_policy(augment.policy, size, preprocessing))
        elif augment.color_jitter:
            steps.append(v2.ColorJitter(*3 * [augment.color_jitter]))
        steps += [v2.ToImage(), _ToNormalised(preprocessing)]
        if augment.erase:
            from timm.data.random_erasing import RandomErasing

            steps.append(RandomErasing(augment.erase, mode="pixel", device="cpu"))
        self.steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        result: Any = to_mode(image, self.preprocessing.channels)
        for step in self.steps:
            result = step(result)
        return result


class _ToNormalised:
    def __init__(self, preprocessing: Preprocessing):
        self.mean, self.std = list(preprocessing.mean), list(preprocessing.std)

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as T

        return T.normalize(T.to_dtype(image, scale=True), self.mean, self.std)


def train_transform(preprocessing: Preprocessing, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """The training transform of a model's preprocessing; without augmentation it is the preprocessing itself.

    Raises:
        UsageError: unknown policy; the message names near ones.
    """
    return preprocessing if augment == Augment() else TrainTransform(preprocessing, augment)


def _policy(name: str, size: int, preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    from timm.data import auto_augment
    from torchvision.transforms import v2

    kind = name.partition("-")[0]
    if kind not in POLICIES:
        raise UsageError(f"unknown augmentation policy {name!r}{nearest(kind, POLICIES)} (kinds: {', '.join(POLICIES)})")
    hints = dict(translate_const=int(size * 0.45), img_mean=tuple(round(255 * m) for m in preprocessing.mean))
    try:
        if kind == "rand":
            transform = auto_augment.rand_augment_transform(name, hints)
            for op in transform.ops:
                if op.name.startswith("Posterize"):
                    op.level_fn = _at_least_one_bit(op.level_fn)
            return transform
        if kind == "augmix":
            return auto_augment.augment_and_mix_transform(name, hints)
        if kind == "3a":
            one = [v2.Grayscale(3), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(5, (0.1, 2.0))]
            return v2.Compose([v2.RandomChoice(one), v2.ColorJitter(0.3, 0.3, 0.3)])
        return auto_augment.auto_augment_transform(name, hints)
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(f"augmentation policy {name!r} is not in timm's form, such as 'rand-m9-mstd0.5-inc1': {error}") from error


def _at_least_one_bit(level_fn: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """timm asks strong posterising for 0 bits, which Pillow refuses since version 13; 1 bit is the strongest that is left."""
    return lambda level, hparams: tuple(max(1, bits) for bits in level_fn(level, hparams))
