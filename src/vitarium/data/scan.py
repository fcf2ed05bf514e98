"""Listing of the images below folders. Every file that is left out is counted; no file is listed twice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitarium.data.clips import is_video_file
from vitarium.data.images import has_signature, is_image_file
from vitarium.errors import DataError

NOT_DATA = ("__MACOSX", "__pycache__")
"""Folders that archives and Python leave behind. Like hidden files and folders they are not read and not counted."""

REMEDIES = {
    "heic": "convert them to JPEG or PNG",
    "heif": "convert them to JPEG or PNG",
    "svg": "export them as PNG",
    "pdf": "export the pages as PNG",
    **dict.fromkeys(("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2"), "develop these raw photographs into JPEG or TIFF"),
    **dict.fromkeys(("tga", "psd", "exr", "hdr", "pcx", "dds", "jxl"), "convert them to PNG"),
    "dcm": "convert them to 16-bit PNG",
    "npy": "save the arrays as images",
}
"""Endings of images that are not read -> what to do with such files."""


@dataclass
class Scan:
    """Files below some folders.

    Attributes:
        images, videos: sorted paths of each of the folders.
        left_out: number of other files by their ending.
        examples: one of these files by its ending.
        links: links to files or folders that are counted already.
    """

    images: dict[Path, list[str]]
    videos: dict[Path, list[str]]
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)

    def leave_out(self, file: str, kind: str) -> None:
        """Count a file that is left out."""
        self.left_out[kind] += 1
        self.examples.setdefault(kind, file)

    def notes(self, root: Path) -> tuple[str, ...]:
        """Return sentences for the user on what was left out, with paths relative to `root`."""
        found = []
        if count := sum(self.left_out.values()):
            kinds = []
            for kind, number in self.left_out.most_common(8):
                remedy = f"; {REMEDIES[kind[1:]]}" if kind[1:] in REMEDIES else ""
                kinds.append(f"{number} {kind} (such as {os.path.relpath(self.examples[kind], root)}{remedy})")
            more = f", and {len(self.left_out) - 8} more kinds" if len(self.left_out) > 8 else ""
            found.append(
                f"{root}: {count} file{'s are' if count > 1 else ' is'} left out, not images that can be read: {', '.join(kinds)}{more}"
            )
        if self.links:
            shown = os.path.relpath(self.links[0], root)
            found.append(f"{root}: {len(self.links)} links to files or folders that are counted already are left out, such as {shown}")
        return tuple(found)


def scan(folders: Sequence[Path], root: Path | None = None) -> Scan:
    """List the images and videos at any depth below some folders.

    Hidden files and folders are not read. Links are followed; a folder or file is counted once, at its own place rather than at a link. A
    folder inside another of `folders` belongs to itself only.

    Args:
        folders: to list; links among them are followed, too.
        root: of the data, which may be a link itself: links inside to it and to the folders above it are left out. None: the folders
            themselves are the roots.

    Raises:
        DataError: one of the folders cannot be read.
    """
    found = Scan({folder: [] for folder in folders}, {folder: [] for folder in folders})
    walk = _Walk(found, _identities([root, *root.absolute().resolve().parents] if root else []))
    walk.run(folders, root)
    for listed in (*found.images.values(), *found.videos.values()):
        listed.sort()
    return found


def subfolders(path: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden ones and those of `NOT_DATA`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name not in NOT_DATA)
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {error.strerror or error}") from error


def find_images(path: Path) -> list[str]:
    """Return the paths of images at any depth below a folder, sorted. See `scan`."""
    return scan([path]).images[path]


def find_videos(path: Path) -> list[str]:
    """Return the paths of videos, like `find_images`."""
    return scan([path]).videos[path]


class _Walk:
    """A walk through folders: their own contents first, then what links lead to, so that nothing is counted at a link only."""

    def __init__(self, found: Scan, walked: set[tuple[int, int]]):
        self.found, self.walked = found, walked
        self.linked_folders: list[tuple[Path, str]] = []
        self.linked_files: list[tuple[Path, str]] = []

    def run(self, folders: Sequence[Path], root: Path | None) -> None:
        own = [folder for folder in folders if folder == root or not os.path.islink(folder)]
        tops = {_identity(folder): folder for folder in own}
        self.walked -= tops.keys()
        for folder in own:
            self._enter(folder, os.fspath(folder), tops)
        self.linked_folders += [(folder, os.fspath(folder)) for folder in folders if folder not in own]
        while self.linked_folders:
            folder, link = self.linked_folders.pop(0)
            if _identity(link) in self.walked:
                self.found.links.append(link)
            else:
                self._enter(folder, link, {})
        known: set[tuple[int, int]] = set()
        for folder, link in self.linked_files:
            place = _identity(link)
            if place in known or (place is not None and _identity(os.path.dirname(os.path.realpath(link))) in self.walked):
                self.found.links.append(link)
                continue
            if place is not None:
                known.add(place)
            self._file(folder, link, os.path.basename(link))

    def _enter(self, top: Path, start: str, tops: dict[tuple[int, int] | None, Path]) -> None:
        """List a folder and all below it, without following links, and without the other `tops`."""
        stack = [start]
        while stack:
            here = stack.pop()
            place = _identity(here)
            if place in self.walked or (here != os.fspath(top) and place in tops):
                continue
            if place is not None:
                self.walked.add(place)
            try:
                with os.scandir(here) as entries:
                    for entry in entries:
                        self._entry(top, entry, stack)
            except OSError as error:
                raise DataError(f"cannot read the folder {here}: {error.strerror or error}") from error

    def _entry(self, top: Path, entry: os.DirEntry[str], stack: list[str]) -> None:
        name = entry.name
        if name.startswith(".") or name in NOT_DATA:
            return
        link, folder = entry.is_symlink(), entry.is_dir()
        if folder:
            if link:
                self.linked_folders.append((top, entry.path))
            else:
                stack.append(entry.path)
        elif link:
            self.linked_files.append((top, entry.path))
        elif entry.is_file():
            self._file(top, entry.path, name)
        else:
            self.found.leave_out(entry.path, "no regular file")

    def _file(self, top: Path, file: str, name: str) -> None:
        if os.path.exists(file) and not os.path.isfile(file):
            self.found.leave_out(file, "no regular file")
        elif is_image_file(name) or ("." not in name and has_signature(file)):
            self.found.images[top].append(file)
        elif is_video_file(name):
            self.found.videos[top].append(file)
        else:
            self.found.leave_out(file, os.path.splitext(name)[1].lower() or "without an ending")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return the device and number of a file or folder; None if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities(paths: Sequence[Path | None]) -> set[tuple[int, int]]:
    return {place for path in paths if path is not None and (place := _identity(path)) is not None}
