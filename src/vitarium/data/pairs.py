"""Pairs of low- and high-resolution images for restoration, and high-resolution images that are downsampled on the fly."""

from __future__ import annotations

import operator
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vitarium.data.image_set import ImageData, Samples, Subset, View
from vitarium.data.images import open_image
from vitarium.data.parts import Divided, divide, few, find_parts, natural_order, part_in
from vitarium.data.photos import sample_photos
from vitarium.data.scan import find_images, subfolders
from vitarium.data.unlabelled import image_parts
from vitarium.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

HIGH_NAMES, LOW_NAMES = ("hr", "high", "gt", "target"), ("lr", "low", "lq", "input")
"""Accepted names of the two folders, in any case; also as endings, such as DIV2K_train_HR and DIV2K_train_LR_bicubic."""

CROPS = 256
"""A training part with fewer images is repeated within an epoch, each time with other crops."""

PHOTO_SIDE = 256
"""Side of the squares cut from the embedded photographs, pixels."""

NOT_SCENERY = ("cells", "galaxies", "moon", "retina", "tissue")
"""Embedded images from microscopes or telescopes, which are left out: their detail is mostly noise."""

ACCEPTED = (
    "accepted: photos; a folder of images at any depth (from which the low-resolution ones are made); or a folder with HR/ and LR/ "
    "(high/ and low/), at its top or below train/ and val/, or as in DIV2K; if LR/ holds X2/, X4/ ..., name one: FOLDER:x2"
)


class HighImages(Samples):
    """High-resolution images as (image, None); the low-resolution image is derived from each.

    Args:
        files: paths.
    """

    def __init__(self, files: list[str]):
        super().__init__(files, read=_read_high)


class PairedImages(Samples):
    """Pairs of images: (low, high).

    Args:
        pairs: (path of the low-resolution image, path of the high-resolution one).
        scale: side of the high-resolution images over that of the low-resolution ones.
    """

    def __init__(self, pairs: list[tuple[str, str]], scale: int):
        super().__init__(pairs, read=_read_pair, name=operator.itemgetter(0))
        self.scale = scale


def _read_high(file: str) -> tuple[Image.Image, None]:
    return open_image(file), None


def _read_pair(pair: tuple[str, str]) -> tuple[Image.Image, Image.Image]:
    return open_image(pair[0]), open_image(pair[1])


def _photo_squares(names: list[str], photos: dict[str, Image.Image]) -> Samples:
    """Squares of the embedded photographs, or whole smaller ones: (image, None), named after the photograph."""
    squares = [(name, photos[name].crop(box)) for name in names for box in _squares(*photos[name].size)]
    return Samples(squares, read=lambda square: (square[1], None), name=operator.itemgetter(0))


def _squares(width: int, height: int) -> list[tuple[int, int, int, int]]:
    side = min(PHOTO_SIDE, width, height)
    return [(x, y, x + side, y + side) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]


def open_pairs(
    spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None, split: str | None = None
) -> ImageData:
    """Open image pairs for restoration.

    Args:
        spec: "photos" (the embedded photographs of ordinary objects; whole ones are held out), a folder of images at any depth, or a folder
            with folders of high and of low resolution: see `ACCEPTED`. Partners have the same name, except for x2, x3 ... at the end of the
            low-resolution one's. The parts train, val, test, ... of a folder are kept apart.
        seed, val_fraction: share of the images held out, if the data have no held-out part.
        image_size: ignored: images keep their size.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: no such data, missing partners or parts, or partners whose sizes do not match.
    """
    if split is None and not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if spec == "photos":
        return _open_photos(seed, 0.2 if val_fraction == 1 else val_fraction, split)
    found = re.fullmatch(r"(?:folder:)?(.*?)(?::x(\d))?", spec)
    assert found is not None
    path, scale = Path(found[1]), found[2]
    if not path.is_dir():
        raise DataError(f"there is no folder {found[1]!r} of images\n{ACCEPTED}")
    name = path.resolve().name
    random_split = lambda samples: _split(samples, val_fraction, seed, name)
    if paired := _paired_parts(path, scale):
        pairs, ratio = _checked_pairs(name, paired)
        divided = divide(name, pairs, random_split, val_fraction=val_fraction, split=split)
        return _data(name, PairedImages(divided.train, ratio), PairedImages(divided.val, ratio), divided, ())
    parts, notes = image_parts(path)
    if not any(parts.values()):
        raise DataError(f"{path} holds no images\n{ACCEPTED}")
    ordered = {part: sorted(files, key=natural_order) for part, files in parts.items()}
    divided = divide(name, ordered, random_split, val_fraction=val_fraction, split=split)
    return _data(name, HighImages(divided.train), HighImages(divided.val), divided, notes)


def _open_photos(seed: int, val_fraction: float, split: str | None) -> ImageData:
    photos = {name: photo for name, photo in sample_photos() if name not in NOT_SCENERY}
    train, val = _split(sorted(photos), val_fraction, seed, "photos")
    found = divide("photos", {"train": train, "val": val}, lambda samples: (samples, samples), split=split)
    return ImageData("photos", _photo_squares(found.train, photos), _photo_squares(found.val, photos), [], part=found.part, drawn=True)


def _checked_pairs(name: str, folders: dict[str, tuple[Path, Path]]) -> tuple[dict[str, list[tuple[str, str]]], int]:
    """Return the pairs of each part, and the scale between their images, which is the same in all parts."""
    checked = {part: _pairs(*both) for part, both in folders.items()}
    scales = {part: scale for part, (_, scale) in checked.items()}
    if len(set(scales.values())) > 1:
        listed = ", ".join(f"those of {part} by {scale}" for part, scale in scales.items())
        raise DataError(f"{name}: pairs differ in size by different factors: {listed}")
    return {part: pairs for part, (pairs, _) in checked.items()}, next(iter(scales.values()))


def _data(name: str, train: Samples, val: Samples, divided: Divided, notes: Iterable[str]) -> ImageData:
    times = -(-CROPS // len(train)) if len(train) else 1
    repeated = Subset(train, [*range(len(train))] * times) if times > 1 else train
    return ImageData(name, repeated, val, [], notes=(*notes, *divided.notes), part=divided.part, drawn=divided.drawn)


def scale_of(images: object) -> int | None:
    """Return the scale of the high-resolution images of a set; None if the low-resolution ones are made from them."""
    while isinstance(images, View):
        images = images.images
    return getattr(images, "scale", None)


def _images_in(folder: Path) -> list[str]:
    files = sorted(find_images(folder), key=natural_order)
    if not files:
        raise DataError(f"{folder} holds no images\n{ACCEPTED}")
    return files


def _split(samples: list, val_fraction: float, seed: int, name: str) -> tuple[list, list]:
    """Split at random into (training, held-out), at least one each."""
    if len(samples) < 2:
        raise DataError(f"{name} holds one image; at least two are needed, one of them held out")
    count = min(max(1, round(val_fraction * len(samples))), len(samples) - 1)
    held = set(random.Random(f"{seed} pairs").sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in held], [s for i, s in enumerate(samples) if i in held]


def _paired_parts(path: Path, scale: str | None) -> dict[str, tuple[Path, Path]]:
    """Return part -> (folder of low resolution, folder of high resolution), with "" for a folder without parts; {} without pairs."""
    folders = subfolders(path)
    if inside := find_parts(folders):
        parts = {part: _two_folders(path / name, scale) for part, name in inside.items()}
        complete = {part: pair for part, pair in parts.items() if pair is not None}
        if complete and len(complete) < len(parts):
            lone = few([inside[part] for part in parts if part not in complete])
            raise DataError(f"{path} has folders of high and of low resolution in one part, but not below {lone}\n{ACCEPTED}")
        if complete:
            return complete
    prefixes = {m[1].lower() for name in folders if (m := _named(name, HIGH_NAMES))}
    named = {prefix: pair for prefix in sorted(prefixes) if (pair := _two_folders(path, scale, prefix)) is not None}
    by_part = {part: pair for prefix, pair in named.items() if (part := part_in(prefix)) is not None}
    if "train" in by_part and len(by_part) > 1:
        return by_part
    return {"": next(iter(named.values()))} if named else {}


def _named(name: str, roles: tuple[str, ...]) -> re.Match[str] | None:
    """Match a folder's name; group 1 is the text before the role: "DIV2K_train_" of DIV2K_train_LR_bicubic."""
    return re.fullmatch(rf"((?:.*[_-])?)(?:{'|'.join(roles)})(?:[_-].*)?", name, re.IGNORECASE)


def _two_folders(path: Path, scale: str | None, prefix: str = "") -> tuple[Path, Path] | None:
    """Return the folders (low, high) below a folder, or None."""
    entries = [path / name for name in subfolders(path)]
    fits = lambda entry, roles: (m := _named(entry.name, roles)) is not None and m[1].lower() == prefix
    high = next((entry for entry in entries if fits(entry, HIGH_NAMES)), None)
    low = next((entry for entry in entries if fits(entry, LOW_NAMES)), None)
    if high is None or low is None:
        return None
    scales = {entry.name[1:]: entry for entry in low.iterdir() if entry.is_dir() and re.fullmatch(r"[xX]\d", entry.name)}
    if scales and scale is None and len(scales) > 1:
        raise DataError(f"{low} holds {few(sorted(e.name for e in scales.values()))}; name one, as in {path}:x{min(scales)}")
    if scales and scale is not None and scale not in scales:
        raise DataError(f"{low} holds no X{scale}, it holds {few(sorted(e.name for e in scales.values()))}")
    return (scales[scale or next(iter(scales))] if scales else low), high


def _pairs(low_folder: Path, high_folder: Path) -> tuple[list[tuple[str, str]], int]:
    """Return (low, high) files, and the scale between them."""
    low, high = ({_stem(file, folder): file for file in _images_in(folder)} for folder in (low_folder, high_folder))
    low = {name if name in high else re.sub(r"[_-]?x\d$", "", name, flags=re.IGNORECASE): file for name, file in low.items()}
    alone = [f"{high_folder.name}/{name}" for name in high if name not in low]
    alone += [f"{low_folder.name}/{name}" for name in low if name not in high]
    if alone:
        raise DataError(
            f"{low_folder.parent}: {len(alone)} images have no partner of the other resolution: {few(alone)}; add or remove them"
        )
    pairs = [(low[name], high[name]) for name in high]
    return pairs, _common_scale(pairs)


def _stem(file: str, folder: Path) -> str:
    return os.path.splitext(os.path.relpath(file, folder))[0]


def _common_scale(pairs: list[tuple[str, str]]) -> int:
    """Find the scale from the files' headers; a file that cannot be read is left to the loader, which records it."""
    from PIL import Image

    scales: dict[int, list[str]] = {}
    for low, high in pairs:
        try:
            with Image.open(low) as small, Image.open(high) as large:
                sizes = small.size, large.size
        except Exception:  # broken files raise all kinds of errors
            continue
        scale = max(1, round(sizes[1][0] / sizes[0][0]))
        fits = all(0 <= b - a * scale < scale for a, b in zip(*sizes, strict=True))
        listed = f"{os.path.basename(low)} {sizes[0][0]}x{sizes[0][1]} to {sizes[1][0]}x{sizes[1][1]}"
        scales.setdefault(scale if fits else 0, []).append(listed)
    if odd := scales.pop(0, []):
        raise DataError(f"{len(odd)} pairs do not differ in size by a whole factor: {few(odd)}")
    if not scales:
        raise DataError(f"none of {len(pairs)} pairs can be read, such as {pairs[0][0]}")
    if len(scales) > 1:
        usual = max(scales, key=lambda s: len(scales[s]))
        others = [listed for scale, names in scales.items() if scale != usual for listed in names]
        raise DataError(f"most pairs differ in size by {usual}, but {len(others)} do not: {few(others)}")
    return next(iter(scales))
