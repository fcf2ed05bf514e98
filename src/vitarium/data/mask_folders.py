"""Images with one PNG mask each, whose values are class numbers: ADE20K, Cityscapes and most custom data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vitarium.data.bad_files import BrokenImage
from vitarium.data.folders import find_images
from vitarium.data.image_set import Samples
from vitarium.data.images import open_image
from vitarium.data.joint import Segmentation
from vitarium.data.parts import few, part_names
from vitarium.data.segmented import SegmentedData, split_samples
from vitarium.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IGNORE = 255
SHOWN = 10


class Pair(NamedTuple):
    """Paths of an image and its mask."""

    file: str
    mask: str


def open_mask_folder(
    path: Path, *, void: str | None = None, broken: str = "refuse", seed: int = 0, val_fraction: float = 0.2
) -> SegmentedData:
    """Open a folder with images/ and masks/ (or labels/, annotations/), each flat or with training and held-out parts of the same names.

    A mask has its image's name with the extension .png; its values are class numbers from 0 on, and 255 is void. In ADE20K, recognised
    by its objectInfo150.txt, 0 is void and classes count from 1. Class names are in classes.txt, one per line.

    Args:
        void: "0" for ADE20K's convention, "255" for the usual one; None: detected from the files.
        broken: "refuse" images without masks, or "drop" them.

    Raises:
        DataError: another layout, no class names, images without masks.
    """
    masks = next((path / name for name in ("masks", "labels", "annotations") if (path / name).is_dir()), None)
    if masks is None or not (path / "images").is_dir():
        raise DataError(f"{path} holds no images/ with masks/ (or labels/, annotations/) beside; nor annotations/*.json in COCO's layout")
    ade = path / "objectInfo150.txt"
    classes = _ade_names(ade) if ade.is_file() else _names(path / "classes.txt")
    zero_is_void = void == "0" or (void is None and ade.is_file())
    train_name, val_name = part_names(entry.name for entry in (path / "images").iterdir() if entry.is_dir())
    name = path.resolve().name
    if train_name and val_name:
        parts = tuple(_pairs(path / "images" / part, masks / part, broken) for part in (train_name, val_name))
    else:
        parts = split_samples(_pairs(path / "images", masks, broken), val_fraction, seed, name)
    if not all(parts):
        raise DataError(f"{name} holds {len(parts[0])} images for training and {len(parts[1])} held out; both must not be empty")
    read = functools.partial(read_pair, classes=len(classes), zero_is_void=zero_is_void)
    train, val = (Samples(part, read=read, name=lambda pair: pair.file) for part in parts)
    return SegmentedData(name, train, val, classes)


def _names(file: Path) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.parent} needs a file classes.txt with one class name per line, in the order of the mask's values"
        ) from error
    if not names or len(set(names)) < len(names):
        raise DataError(f"{file} {'names a class twice' if names else 'is empty'}; it must hold one class name per line")
    return names


def _ade_names(file: Path) -> list[str]:
    """Read the last column of ADE20K's table; of several names of a class the first."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]


def _pairs(images: Path, masks: Path, broken: str) -> list[Pair]:
    files = sorted(find_images(images))
    pairs = [Pair(file, str((masks / Path(file).relative_to(images)).with_suffix(".png"))) for file in files]
    alone = [pair for pair in pairs if not Path(pair.mask).is_file()]
    if alone and broken == "refuse":
        listed = "\n".join(f"  {pair.file}: there is no {pair.mask}" for pair in alone[:SHOWN])
        more = f"\n  and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
        raise DataError(
            f"{len(alone)} of {len(pairs)} images have no mask:\n{listed}{more}\nadd them, or leave these out with masks:PATH,broken=drop"
        )
    return [pair for pair in pairs if pair not in set(alone)]


def read_pair(pair: Pair, *, classes: int, zero_is_void: bool) -> tuple[Image.Image, Segmentation]:
    """Open an image and its mask.

    Raises:
        BrokenImage: one of them cannot be read, they differ in size, or the mask has values that are not classes.
    """
    image, mask = open_image(pair.file), open_image(pair.mask)
    values = np.asarray(mask)
    if values.ndim != 2:
        raise BrokenImage(pair.mask, f"a mask must have one value per pixel (grey or palette), this one is {mask.mode}")
    if values.shape != (image.height, image.width):
        sizes = f"the mask has {mask.height} x {mask.width} pixels (height x width), the image {image.height} x {image.width}"
        raise BrokenImage(pair.mask, sizes)
    values = values.astype(np.int64)
    if zero_is_void:
        values = np.where(values == 0, IGNORE, values - 1)
    labels = np.unique(values[values != IGNORE])
    if wrong := labels[labels >= classes].tolist():
        raise BrokenImage(pair.mask, f"the mask has values that are not classes: {few(wrong)} (classes are 0 to {classes - 1})")
    return image, Segmentation(values == labels[:, None, None], labels)
