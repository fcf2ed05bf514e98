"""Images with one PNG mask each, whose values are class numbers: ADE20K, Cityscapes and most custom data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitarium.data.bad_files import BrokenImage
from vitarium.data.image_set import Samples
from vitarium.data.images import open_image, open_mask
from vitarium.data.joint import Segmentation
from vitarium.data.parts import few, find_parts
from vitarium.data.scan import scan, subfolders
from vitarium.data.segmented import SegmentedData, divide_samples
from vitarium.errors import DataError
from vitarium.texts import indented

if TYPE_CHECKING:
    from PIL import Image

IGNORE = 255
SEARCHED = 1000
"""Largest number of masks in which classes are looked for when the data is opened."""


class Pair(NamedTuple):
    """Paths of an image and its mask."""

    file: str
    mask: str


def open_mask_folder(
    path: Path,
    *,
    void: str | None = None,
    mapping: str | None = None,
    broken: str = "refuse",
    seed: int = 0,
    val_fraction: float = 0.2,
    split: str | None = None,
) -> SegmentedData:
    """Open a folder with images/ and masks/ (or labels/, annotations/), each flat or with training and held-out parts of the same names.

    A mask has its image's name with the extension .png; its values are class numbers from 0 on, and 255 is void. In ADE20K, recognised
    by its objectInfo150.txt, 0 is void and classes count from 1. Class names are in classes.txt, one per line.

    Args:
        void: "0" for ADE20K's convention, "255" for the usual one; None: detected from the files.
        mapping: class numbers of values that are none, such as "255:1" or "128:1+255:2".
        broken: "refuse" images without masks, or "drop" them.
        seed, val_fraction: of the held-out part, if there is none.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: another layout, no class names, images without masks, or masks of which 255 seems to be a class.
    """
    masks = next((path / name for name in ("masks", "labels", "annotations") if (path / name).is_dir()), None)
    if masks is None or not (path / "images").is_dir():
        raise DataError(f"{path} holds no images/ with masks/ (or labels/, annotations/) beside; nor annotations/*.json in COCO's layout")
    ade = path / "objectInfo150.txt"
    classes = _ade_names(ade) if ade.is_file() else _names(path / "classes.txt")
    zero_is_void = void == "0" or (void is None and ade.is_file())
    classes_of = {int(a): int(b) for a, b in (pair.split(":") for pair in mapping.split("+"))} if mapping else {}
    numbering: dict[str, Any] = {"zero_is_void": zero_is_void, "classes_of": classes_of}
    read = functools.partial(read_pair, classes=len(classes), **numbering)
    found = find_parts(subfolders(path / "images"))
    places = {part: (path / "images" / name, masks / name) for part, name in found.items()}
    if "train" not in places and len(places) != len([e for e in (path / "images").iterdir() if not e.name.startswith(".")]):
        places = {"": (path / "images", masks)}
    listed = scan([images for images, _ in places.values()], path / "images")
    parts = {part: _pairs(images, listed.images[images], own, broken) for part, (images, own) in places.items()}
    name = path.resolve().name
    chosen = divide_samples(name, parts, seed=seed, val_fraction=val_fraction, split=split)
    absent = _check_classes(
        path, [pair for pairs in parts.values() for pair in pairs], classes, functools.partial(class_numbers, **numbering)
    )
    train, val = (Samples(part, read=read, name=lambda pair: pair.file) for part in (chosen.train, chosen.val))
    notes = (*listed.notes(path / "images"), *absent, *chosen.notes)
    return SegmentedData(name, train, val, classes, notes=notes, part=chosen.part, drawn=chosen.drawn)


def _check_classes(
    path: Path, pairs: list[Pair], classes: list[str], numbers_of: Callable[[NDArray[Any]], NDArray[np.int64]]
) -> tuple[str, ...]:
    """Check that 255, which is void, does not stand for a class: up to `SEARCHED` masks are read until each class was found.

    Returns:
        a note on classes that were not found, if there are any.

    Raises:
        DataError: a class occurs in no mask, or there is but one, while pixels have the value 255.
    """
    missing, void, only_two = set(range(len(classes))), 0, True
    searched = pairs[:: max(1, -(-len(pairs) // SEARCHED))]
    for pair in searched:
        try:
            values = np.asarray(open_mask(pair.mask))
        except BrokenImage:  # the loader records it
            continue
        numbers = numbers_of(values)
        missing.difference_update(np.unique(numbers).tolist())
        if not missing and len(classes) > 1:
            return ()
        void += int(((numbers == IGNORE) & (values == IGNORE)).sum())
        only_two = only_two and set(np.unique(values).tolist()) <= {0, IGNORE}
    unseen = few([f"{number} ({classes[number]})" for number in sorted(missing)])
    where = "no mask" if len(searched) == len(pairs) else f"none of {len(searched)} masks"
    if not void or not (only_two or (missing and len(searched) == len(pairs))):
        return (f"{path}: these classes occur in {where}: {unseen}",) if missing else ()
    number = min(missing, default=1)
    what = f"these classes occur in {where}: {unseen}" if missing else f"{classes[0]} is the only class"
    mapped = f"write masks:{path},map=255:{number}" + ("" if missing else " and name both classes in classes.txt")
    raise DataError(
        f"{path}: {void:,} pixels of the masks have the value 255, which stands for void (pixels without a class), and {what}; "
        f"if 255 is class {number}, {mapped}; if it is void, name in classes.txt only classes that occur"
    )


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


def _pairs(images: Path, files: list[str], masks: Path, broken: str) -> list[Pair]:
    """Return the image files below `images` with their masks below `masks`; those without one are an error or dropped."""
    pairs = [Pair(file, str((masks / Path(file).relative_to(images)).with_suffix(".png"))) for file in files]
    alone = {pair for pair in pairs if not os.path.isfile(pair.mask)}
    if alone and broken == "refuse":
        listed = indented([f"{pair.file}: there is no {pair.mask}" for pair in sorted(alone)])
        raise DataError(
            f"{len(alone)} of {len(pairs)} images have no mask:\n{listed}\nadd them, or leave these out with masks:PATH,broken=drop"
        )
    return [pair for pair in pairs if pair not in alone]


def class_numbers(values: NDArray[Any], *, zero_is_void: bool, classes_of: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the class numbers of a mask's values, `IGNORE` where there is none; same shape.

    Args:
        values: of the mask.
        zero_is_void: whether 0 is no class, and classes count from 1.
        classes_of: value -> class number, for values that are no class numbers.
    """
    values = values.astype(np.int64)
    numbers = np.where(values == 0, IGNORE, values - 1) if zero_is_void else values.copy()
    for value, number in classes_of.items():
        numbers[values == value] = number
    return numbers


def read_pair(
    pair: Pair, *, classes: int, zero_is_void: bool, classes_of: Mapping[int, int] = MappingProxyType({})
) -> tuple[Image.Image, Segmentation]:
    """Open an image and its mask.

    Raises:
        BrokenImage: one of them cannot be read, they differ in size, or the mask has values that are not classes.
    """
    image, mask = open_image(pair.file), open_mask(pair.mask)
    values = np.asarray(mask)
    if values.ndim != 2:
        raise BrokenImage(pair.mask, f"a mask must have one value per pixel (grey or palette), this one is {mask.mode}")
    if values.shape != (image.height, image.width):
        sizes = f"the mask has {mask.height} x {mask.width} pixels (height x width), the image {image.height} x {image.width}"
        raise BrokenImage(pair.mask, sizes)
    if mask.mode == "F":
        raise BrokenImage(pair.mask, "a mask must have whole numbers, this one has floating-point values")
    values = class_numbers(values, zero_is_void=zero_is_void, classes_of=classes_of)
    labels = np.unique(values[values != IGNORE])
    if wrong := labels[(labels >= classes) | (labels < 0)].tolist():
        advice = f"classes are 0 to {classes - 1}; map={wrong[0]}:CLASS in masks:PATH,map={wrong[0]}:CLASS reads a value as a class"
        raise BrokenImage(pair.mask, f"the mask has values that are not classes: {few(wrong)} ({advice})")
    return image, Segmentation(values == labels[:, None, None], labels)
