"""Images in class folders, and images listed in a CSV file."""

from __future__ import annotations

import csv
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vitarium.data.clips import is_video_file, open_file
from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import is_image_file
from vitarium.data.parts import Listing, assemble, few, part_names
from vitarium.errors import DataError, require

if TYPE_CHECKING:
    pass

PATH_COLUMNS = ("path", "image", "file", "filename", "file_name")
LABEL_COLUMNS = ("label", "class", "target")


class FileImages(Samples):
    """Image or video files with class numbers. Each is opened when it is accessed."""

    def __init__(self, files: list[str], targets: list[int]):
        super().__init__(files, targets, read=open_file)


def open_folder(path: Path, *, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Open a folder of class folders, or one with a train/ and a val/ (or valid/, validation/, ..., test/) of class folders.

    Class names are the folders' names; images (or, if there are none at all, videos) may be at any depth below them. Hidden files and
    folders are ignored.

    Raises:
        DataError: it cannot be trained on; the message has the contents and the accepted layouts.
    """
    folders = _subfolders(path)
    train, val = part_names(folders)
    if train is None and val is not None and not set(folders) - {val}:
        raise DataError(f"{path} holds {val}/ but no train/; put the training images into {path / 'train'}")
    if train is None:
        return assemble(_name(path), FileImages, list_classes(path), seed=seed, val_fraction=val_fraction)
    held_out = list_classes(path / val) if val is not None else None
    return assemble(_name(path), FileImages, list_classes(path / train), held_out, seed=seed, val_fraction=val_fraction)


def list_classes(path: Path) -> Listing:
    """List the images below a folder's class folders, sorted by class and path; the videos, if there are no images at all.

    Raises:
        DataError: no class folders, no images, or a class folder without images.
    """
    folders = _subfolders(path)
    images = any(next(find_images(path / folder), None) for folder in folders)
    if not images and any(next(find_videos(path / folder), None) for folder in folders):
        require("av", "video")
        find = find_videos
    else:
        find = find_images
    listing, empty = Listing([], []), []
    for folder in folders:
        files = sorted(find(path / folder))
        listing.samples.extend(files)
        listing.labels.extend([unicodedata.normalize("NFC", folder)] * len(files))  # macOS stores é as e and an accent
        if not files:
            empty.append(folder)
    if not listing.samples:
        raise DataError(_nothing(path))
    if empty:
        found = "; ".join(f"{folder}/ holds {_kinds(path / folder)}" for folder in empty[:5])
        raise DataError(f"{path}: {len(empty)} of {len(folders)} class folders hold no images ({found}); fill or remove them")
    return listing


def find_images(path: Path) -> Iterator[str]:
    """Yield the paths of images at any depth below a folder, in no order. Links are followed, each folder once."""
    return (file for file in _walk(path) if is_image_file(file))


def find_videos(path: Path) -> Iterator[str]:
    """Yield the paths of videos, like `find_images`."""
    return (file for file in _walk(path) if is_video_file(file))


def open_table(path: Path, *, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Open a CSV file with one line per image: columns path and label, and optionally split (train, val).

    Paths are relative to the CSV file's folder.

    Raises:
        DataError: columns, labels or files are missing, or a file is listed twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; it should be a CSV file in UTF-8") from error
    columns = [column for column in (rows[0] if rows else {}) if column]
    file_column = next((c for c in columns if c.lower() in PATH_COLUMNS), None)
    label_column = next((c for c in columns if c.lower() in LABEL_COLUMNS), None)
    if file_column is None or label_column is None:
        found = f"columns {few(columns)}" if columns else "no lines"
        raise DataError(f"{path} has {found}; it needs a header line with path and label (and optionally split)")
    files = [str(path.parent / (row[file_column] or "")) for row in rows]
    labels = [(row[label_column] or "").strip() for row in rows]
    twice = [file for file, count in Counter(files).items() if count > 1]
    absent = [file for file in files if not os.path.isfile(file)]
    unlabelled = [str(number) for number, label in enumerate(labels, start=2) if not label]
    for bad, what in ((twice, "files are listed twice"), (absent, "files do not exist"), (unlabelled, "lines have no label")):
        if bad:
            raise DataError(f"{path}: {len(bad)} {what}: {few(bad)}")
    parts: dict[str, Listing] = {}
    split_column = next((c for c in columns if c.lower() == "split"), None)
    for row, file, label in zip(rows, files, labels, strict=True):
        part = parts.setdefault((row[split_column] or "").strip() if split_column else "train", Listing([], []))
        part.samples.append(file)
        part.labels.append(label)
    train, val = part_names(parts)
    if train is None:
        raise DataError(f"{path}: the column split has {few(list(parts))}; it needs train (and val)")
    return assemble(path.stem, FileImages, parts[train], parts[val] if val else None, seed=seed, val_fraction=val_fraction)


def _subfolders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {error.strerror or error}") from error


def _walk(path: Path) -> Iterator[str]:
    seen = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link back to a parent
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (os.path.join(folder, file) for file in files)


def _nothing(path: Path) -> str:
    """Return an error for a folder without images in class folders, with its contents and the accepted layouts."""
    wanted = "accepted: one folder per class with its images, at the top or below train/ and val/"
    loose = sum(is_image_file(file) for file in os.listdir(path))
    if loose:
        return f"{path} holds {loose} images but no class folders; {wanted}"
    return f"{path} holds no images in class folders; it holds {_kinds(path)}; {wanted}"


def _kinds(path: Path) -> str:
    """Return the contents of a folder in words, such as '3 .csv and 1 .zip files'."""
    counts = Counter(os.path.splitext(file)[1].lower() or "nameless" for file in itertools.islice(_walk(path), 10_000))
    return " and ".join(f"{count} {kind}" for kind, count in counts.most_common(4)) + " files" if counts else "nothing"


def _name(path: Path) -> str:
    return path.resolve().name or str(path)
