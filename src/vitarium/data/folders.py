"""Images in class folders, and images listed in a CSV file."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitarium.data.clips import open_file
from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import is_image_file
from vitarium.data.parts import Listing, assemble, few, find_parts, part_of
from vitarium.data.scan import Scan, scan, subfolders
from vitarium.data.tables import TableOptions, read_table
from vitarium.errors import DataError, require

LABEL_COLUMNS = ("label", "class", "target")


class FileImages(Samples):
    """Image or video files with class numbers. Each is opened when it is accessed."""

    def __init__(self, files: list[str], targets: list[int]):
        super().__init__(files, targets, read=open_file)


def open_folder(path: Path, *, seed: int = 0, val_fraction: float = 0.2, split: str | None = None) -> ImageData:
    """Open a folder of class folders, or one whose folders are parts (see `PART_WORDS`: train, val, test, ...) of class folders.

    Class names are the folders' names; images (or, if there are none at all, videos) may be at any depth below them. Hidden files and
    folders are ignored; other files, and folders beside the parts, are counted in the notes.

    Args:
        seed, val_fraction: of the held-out part, if there is none.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: it cannot be used; the message has the contents and the accepted layouts.
    """
    listings, notes = list_parts(path, strict=split is None)
    return assemble(_name(path), FileImages, listings, seed=seed, val_fraction=val_fraction, split=split, notes=notes)


def list_parts(path: Path, *, strict: bool = True) -> tuple[dict[str, Listing], tuple[str, ...]]:
    """List the images of a folder by part ("" without parts) and class, and return notes on what was left out.

    Args:
        strict: whether a class folder without images is an error; else it is noted.

    Raises:
        DataError: no class folders, no images, or a class folder without images.
    """
    parts, unused = _class_folders(path)
    folders = {part: [place / name for name in names] for part, (place, names) in parts.items()}
    loose = {place: _files_in(place) for place, _ in parts.values()}
    found = scan([*(folder for part in folders.values() for folder in part), *(path / name for name in unused)], path)
    images = any(found.images[folder] for part in folders.values() for folder in part)
    videos = any(found.videos[folder] for part in folders.values() for folder in part)
    if not images and videos:
        require("av", "video")
    files = found.images if images or not videos else found.videos
    for file in (file for folder in found.videos for file in found.videos[folder] if files is found.images):
        found.leave_out(file, os.path.splitext(file)[1].lower())
    listings, notes = {}, []
    for part, (place, _) in parts.items():
        listings[part], more = _listing(place, folders[part], files, found, strict)
        notes += more
    for name in unused:
        if count := len(found.images[path / name]):
            notes.append(
                f"{path}: {name} is no part of the data, its {count} images are left out (parts are {', '.join(_shown(parts, path))})"
            )
    for place, outside in loose.items():
        if outside:
            notes.append(f"{place}: {len(outside)} images lie outside of the class folders and are left out")
    return listings, (*notes, *found.notes(path))


def _shown(parts: Mapping[str, tuple[Path, list[str]]], path: Path) -> list[str]:
    return [os.path.relpath(place, path) for place, _ in parts.values()]


def _class_folders(path: Path) -> tuple[dict[str, tuple[Path, list[str]]], list[str]]:
    """Return part -> (its folder, the names of its class folders), with "" for data without parts; and the folders that are no part."""
    names = subfolders(path)
    found = find_parts(names)
    others = [name for name in names if name not in found.values()]
    inside = {part: _part_folder(path / name) for part, name in found.items()}
    classes = {part: subfolders(place) for part, place in inside.items()}
    if "train" not in found:
        if found and not others:
            return {part: (inside[part], classes[part]) for part in found}, []
        held_out = {part for part in found if set(classes[part]) & set(others)}
        parts = (
            {"train": (path, [name for name in names if name not in {found[part] for part in held_out}])}
            if held_out
            else {"": (path, names)}
        )
        return parts | {part: (inside[part], classes[part]) for part in sorted(held_out, reverse=True)}, []
    if len(found) == 1 and others and not classes["train"]:  # a class that is called train
        return {"": (path, names)}, []
    return {part: (inside[part], classes[part]) for part in found}, others


def _part_folder(path: Path) -> Path:
    """Return a part's folder, or the folder of the same part inside, as archives have it: test_set/test_set."""
    inside = subfolders(path)
    same = len(inside) == 1 and part_of(inside[0]) is not None and part_of(inside[0]) == part_of(path.name)
    return _part_folder(path / inside[0]) if same else path


def _listing(place: Path, folders: Sequence[Path], files: Mapping[Path, list[str]], found: Scan, strict: bool) -> tuple[Listing, list[str]]:
    """Return the samples of a part, and notes.

    Raises:
        DataError: no images; with `strict` also a class folder without images.
    """
    listing, empty = Listing([], []), []
    for folder in folders:
        listing.samples.extend(files[folder])
        name = unicodedata.normalize("NFC", folder.name)  # macOS stores é as e and an accent
        listing.labels.extend([name] * len(files[folder]))
        if not files[folder]:
            empty.append(folder)
    if not listing.samples:
        raise DataError(_nothing(place))
    if not empty:
        return listing, []
    named = "; ".join(f"{folder.name}/ holds {_kinds(folder)}" for folder in empty[:5])
    what = f"{place}: {len(empty)} of {len(folders)} class folders hold no images ({named})"
    if strict:
        raise DataError(f"{what}; fill or remove them")
    return listing, [what]


def open_table(
    path: Path, options: TableOptions | None = None, *, seed: int = 0, val_fraction: float = 0.2, split: str | None = None
) -> ImageData:
    """Open a CSV file with one line per image: columns path and label, and optionally the part and the patient or group of an image.

    Paths are relative to the CSV file's folder. Which columns give the part and the group, see `Table`.

    Args:
        options: names of columns.
        seed, val_fraction: of the held-out part, if the table has none.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: columns, labels or files are missing, or a file is listed twice.
    """
    table, options = read_table(path), options or TableOptions()
    place, label = table.place(options), table.find(LABEL_COLUMNS, options.labels)
    if place is None or label is None:
        found = f"columns {few(table.names)}" if table.names else "no lines"
        raise DataError(f"{path} has {found}; it needs a header line with path and label (and optionally split)")
    files = [str(path.parent / name) for name in table.column(place)]
    labels = table.column(label)
    twice = [file for file, count in Counter(files).items() if count > 1]
    absent = [file for file in files if not os.path.isfile(file)]
    unlabelled = [str(number) for number, value in enumerate(labels, start=2) if not value]
    for bad, what in ((twice, "files are listed twice"), (absent, "files do not exist"), (unlabelled, "lines have no label")):
        if bad:
            raise DataError(f"{path}: {len(bad)} {what}: {few(bad)}")
    rows, notes = table.parts(options)
    parts = {part: Listing([files[i] for i in numbers], [labels[i] for i in numbers]) for part, numbers in rows.items()}
    groups, more = table.groups(options)
    owners = dict(zip(files, groups, strict=True)) if groups is not None else None
    unused = table.unused({place, label})
    data = assemble(
        path.stem, FileImages, parts, seed=seed, val_fraction=val_fraction, split=split, groups=owners, notes=[*notes, *more, *unused]
    )
    return data


def _files_in(path: Path) -> list[str]:
    """Return the images directly in a folder."""
    with os.scandir(path) as entries:
        return [entry.path for entry in entries if is_image_file(entry.name) and entry.is_file()]


def _nothing(path: Path) -> str:
    """Return an error for a folder without images in class folders, with its contents and the accepted layouts."""
    wanted = "accepted: one folder per class with its images, at the top or below train/ and val/"
    loose = len(_files_in(path))
    if loose:
        return f"{path} holds {loose} images but no class folders; {wanted}"
    return f"{path} holds no images in class folders; it holds {_kinds(path)}; {wanted}"


def _kinds(path: Path) -> str:
    """Return the contents of a folder in words, such as '3 .csv and 1 .zip files'."""
    counts = scan([path]).left_out
    return " and ".join(f"{count} {kind}" for kind, count in counts.most_common(4)) + " files" if counts else "nothing"


def _name(path: Path) -> str:
    return path.resolve().name or str(path)
