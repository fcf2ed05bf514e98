"""Photographs from the packages scikit-learn and scikit-image, without a download."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import open_image
from vitarium.data.parts import Listing, assemble
from vitarium.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FILES = {
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "cat": "skimage/data/chelsea.png",
    "cells": "skimage/data/cell.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "photographer": "skimage/data/camera.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "tissue": "skimage/data/ihc.png",
}

TILES = 6
"""Number of tiles along the shorter side of a photograph."""


def sample_photos() -> list[tuple[str, Image.Image]]:
    """Yield (name, RGB image) of every installed photograph: two with scikit-learn, seventeen with scikit-image as well."""
    return [(name, _photo(name).copy()) for name in _installed()]


def _tile(tile: tuple[str, int, int], image_size: int) -> Image.Image:
    """Return a square tile (photograph, column, row), resized."""
    name, column, row = tile
    photo = _photo(name)
    side = min(photo.size) // TILES
    return photo.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)).resize((image_size, image_size))


def _name_of_tile(tile: tuple[str, int, int]) -> str:
    return f"{tile[0]}, column {tile[1]}, row {tile[2]}"


def open_photos(*, image_size: int | None = None, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Tiles labelled with their photograph. They do not overlap, so that training and held-out part share no pixel."""
    image_size = image_size or 64
    listing = Listing([], [])
    for name in _installed():
        width, height = _photo(name).size
        side = min(width, height) // TILES
        tiles = [(name, column, row) for row in range(height // side) for column in range(width // side)]
        listing.samples.extend(tiles)
        listing.labels.extend([name] * len(tiles))
    make = functools.partial(Samples, read=functools.partial(_tile, image_size=image_size), name=_name_of_tile)
    data = assemble("photos", make, {"": listing}, seed=seed, val_fraction=val_fraction)
    return ImageData(data.name, data.train, data.val, data.classes, image_size, drawn=data.drawn)


@functools.cache
def _installed() -> list[str]:
    found = [name for name, file in FILES.items() if (path := _locate(file)) and path.is_file()]
    if not found:
        raise DataError("no sample photographs are installed; scikit-learn and scikit-image bring them: pip install 'vitarium[data]'")
    return found


def _locate(file: str) -> Path | None:
    """Return the path of a file inside a package, without importing the package."""
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None


@functools.cache
def _photo(name: str) -> Image.Image:
    path = _locate(FILES[name])
    assert path is not None, name
    return open_image(path).convert("RGB")
