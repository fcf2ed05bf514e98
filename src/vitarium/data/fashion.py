"""Fashion-MNIST: a balanced part of it without a download, and all of it where it is installed.

    open_data("fashion")                        # 8,000 images for training, 2,000 held out
    open_data("fashion:train=1000,test=500")    # the first hundred and fifty of each class
    open_data("fashion:all")                    # the 60,000 and 10,000 of a copy on this machine

Images are 28x28 grey photographs of ten kinds of clothes from a shop's catalogue. The embedded part, `assets/fashion.npz`, holds the first
800 images of each class of the original training part and the first 200 of each class of its test part, in the original order
(`tools/pack_fashion.py` made it). Logistic regression on the pixels reaches 83 to 84 %, people about 84 %, large models about 96 %.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
The data are copyright 2017 Zalando SE, under the MIT licence, whose text the file holds (`numpy.load(file)["license"]`).
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitarium.assignments import split_assignment, split_options
from vitarium.data.image_set import ImageData, Samples
from vitarium.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IMAGE_SIZE = 28
SIZES = {"train": 8000, "test": 2000}
"""Images in the parts of the embedded file."""
SYSTEM_COPY = "/usr/share/datasets/fashion-mnist"
"""Folder of Debian's package dataset-fashion-mnist."""
FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
"""Part -> names of its files of images and labels, as published; each may end in .gz."""
LARGEST = 64 * 2**20
"""Bytes of a file after decompression above which it is refused; the largest of the four has 47 MB."""
HELP = """the 70,000 images of Fashion-MNIST are not on this machine; there are three ways to get them:
  apt install dataset-fashion-mnist (Debian, Ubuntu)
  torchvision.datasets.FashionMNIST("DIR", download=True) in Python, then VITARIUM_DATA=DIR
  the files {files} in a folder DIR, then VITARIUM_DATA=DIR
the embedded 10,000 need no download: --data fashion"""
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def open_fashion(options: str = "") -> ImageData:
    """Open Fashion-MNIST as RGB images of 28x28 in ten classes; its own test part is held out.

    Args:
        options: "" for the embedded images; "train=N,test=N" for the first of them, N / 10 of each class; "all" for all 70,000.

    Raises:
        UsageError: an option or number that is not accepted.
        DataError: "all", and no copy is found; or files that are not those of Fashion-MNIST.
    """
    if options == "all":
        folder = find_published().resolve()
        parts = {part: read_published(folder, part) for part in SIZES}
    else:
        counts = _counts(options)
        parts = {part: _first(_embedded()[part], count) for part, count in counts.items()}
    train, test = (_image_set(part, *parts[part]) for part in SIZES)
    return ImageData("fashion", train, test, list(CLASSES), IMAGE_SIZE, part="test", drawn=False)


def _counts(options: str) -> dict[str, int]:
    """Return the number of images of each part."""
    counts: dict[str, int] = {}
    for option in split_options(options):
        if option.partition("=")[0].strip() == "all":
            raise UsageError(f"fashion:all takes no value and no other options, got {options!r}; write fashion:all")
        key, value = split_assignment(option, "fashion takes all, or KEY=VALUE")
        if key not in SIZES:
            raise UsageError(f"fashion has no option {key!r}{nearest(key, SIZES)} (accepted: all, train=8000, test=2000)")
        most = SIZES[key]
        if not value.isdecimal() or not 0 < int(value) <= most or int(value) % len(CLASSES):
            raise UsageError(f"{key} of fashion must be a multiple of 10 from 10 to {most} (as many of each class), got {value!r}")
        if key in counts:
            raise UsageError(f"fashion:{options} sets {key} twice; leave one out")
        counts[key] = int(value)
    return SIZES | counts


def _first(part: Part, count: int) -> Part:
    """Return the first count / 10 images of each class, in the order of the part."""
    images, labels = part
    kept = first_of_each(labels, count)
    return images[kept], labels[kept]


def first_of_each(labels: NDArray[np.integer], count: int) -> NDArray[np.intp]:
    """Return the indices of the first count / 10 labels of each class, sorted."""
    found = [np.flatnonzero(labels == label)[: count // len(CLASSES)] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(found))


def _image_set(part: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Samples:
    def read(number: int) -> Image.Image:
        from PIL import Image

        return Image.fromarray(images[number]).convert("RGB")

    return Samples(range(len(images)), labels.tolist(), read=read, name=lambda number: f"fashion {part} #{number}")


@functools.cache
def _embedded() -> dict[str, Part]:
    file = Path(str(resources.files("vitarium") / "data" / "assets" / "fashion.npz"))
    with np.load(file, allow_pickle=False) as arrays:
        return {part: (arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int64)) for part in SIZES}


def find_published() -> Path:
    """Return the folder of the four published files: below $VITARIUM_DATA, below ./data as in torchvision's examples, or Debian's.

    Raises:
        DataError: there is none.
    """
    roots = [Path(os.environ["VITARIUM_DATA"])] if os.environ.get("VITARIUM_DATA") else []
    for root in (*roots, Path("data"), Path(SYSTEM_COPY)):
        for folder in (root / "FashionMNIST" / "raw", root / "fashion-mnist", root):
            if all(_file(folder, name) for names in FILES.values() for name in names):
                return folder
    raise DataError(HELP.format(files=", ".join(f"{name}.gz" for names in FILES.values() for name in names)))


@functools.cache
def read_published(folder: Path, part: str) -> Part:
    """Read a published part: uint8 images (N, 28, 28) and class numbers (N,).

    Args:
        folder: holds the files of `FILES`, with or without .gz.
        part: "train" or "test".

    Raises:
        DataError: a file is missing, or not what its name says.
    """
    images_name, labels_name = FILES[part]
    images = _read_idx(folder, images_name, 3)
    labels = _read_idx(folder, labels_name, 1)
    if images.shape != (len(labels), IMAGE_SIZE, IMAGE_SIZE) or not len(labels) or labels.max() >= len(CLASSES):
        raise DataError(
            f"{folder}: {images_name} and {labels_name} must hold images of 28x28 and as many labels from 0 to 9, got images of "
            f"shape {images.shape} and {len(labels)} labels"
        )
    return images, labels.astype(np.int64)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Read a file of the IDX format: two zero bytes, type 8 (uint8), the number of dimensions, big-endian sizes, values."""
    path = _file(folder, name)
    if path is None:
        raise DataError(f"{folder} holds no file {name} or {name}.gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(content) > LARGEST or content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions and at most {LARGEST >> 20} MB")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if math.prod(shape) != len(content) - start:
        raise DataError(f"{path}: its header announces {shape} values, the file holds {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
