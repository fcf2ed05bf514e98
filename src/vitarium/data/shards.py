"""WebDataset shards: tar files with random access, so that order and resuming are exact, as with single files.

A sample consists of the files of one shard that share a key, the path up to the first dot: `key.jpg` with `key.cls` (a class number or
name) or `key.json` (with "label" or "cls"). Headers are read once, when the shards are opened; images when they are accessed.
"""

from __future__ import annotations

import functools
import glob
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import EXTENSIONS, decode_image, read_bytes
from vitarium.data.parts import Listing, assemble, few, part_in
from vitarium.errors import DataError, nearest

if TYPE_CHECKING:
    from PIL import Image

MAX_LABEL_BYTES = 1 << 20
MAX_NAME = 1000
"""Largest number of characters of a label in a shard."""

MAX_SHARDS = 100_000
"""Largest number of shards that a pattern may name."""


class Member(NamedTuple):
    """Location of an image: `size` bytes from `offset` on in a shard; `name` is its path inside."""

    shard: str
    offset: int
    size: int
    name: str


def _read(member: Member) -> Image.Image:
    return decode_image(read_bytes(member.shard, member.offset, member.size), _name_of(member))


def _name_of(member: Member) -> str:
    return f"{member.shard}/{member.name}"


def open_shards(path: Path, *, seed: int = 0, val_fraction: float = 0.2, split: str | None = None) -> ImageData:
    """Open a folder of .tar files, one with train/ and val/ below, or a pattern such as "x-{000..009}.tar".

    Shards with "train", "val" or "test" (or another name of `PART_WORDS`) in their names or folders are parts; else a part is held out with
    a fixed seed. Class names come from classes.txt (one per line) or classes.json (a list, or {name: number}) beside the shards; else the
    labels are the names.

    Args:
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: no shards, a damaged one, samples without label, unknown labels, or data that cannot be used.
    """
    shards = find_shards(path)
    folders = {shard.parent for shard in shards}
    words = {shard: part_in(shard.stem) or (part_in(shard.parent.name) if len(folders) > 1 else None) for shard in shards}
    named = {word for word in words.values() if word}
    divided = len(named) > 1 or (split is not None and bool(named) and None not in words.values())
    if divided and (neither := [shard.name for shard in shards if words[shard] is None]):
        raise DataError(
            f"some shards in {path} are named {' and '.join(sorted(named))}, but these neither: {few(neither)}; rename or remove them"
        )
    classes = _read_classes(shards[0])
    listings: dict[str, Listing] = {}
    left_out: Counter[str] = Counter()
    for part in (part for part in ("train", "val", "test") if part in named) if divided else ("",):
        listings[part] = list_samples([shard for shard in shards if not part or words[shard] == part], classes, left_out)
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8))
    notes = [f"{path}: {sum(left_out.values())} files inside the shards are left out: {kinds}"] if left_out else []
    name = (path if path.is_dir() else path.parent).resolve().name
    make = functools.partial(Samples, read=_read, name=_name_of)
    return assemble(name, make, listings, classes=classes, seed=seed, val_fraction=val_fraction, split=split, notes=notes)


def find_shards(path: Path) -> list[Path]:
    """List the .tar files of a folder (and of its train/ and val/), or those of a pattern with {000..009}, {a,b} or *, sorted.

    Raises:
        DataError: there are none, or one of a pattern is missing.
    """
    if path.is_dir():
        shards = sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
    else:
        named = [name for pattern in expand_braces(str(path)) for name in (sorted(glob.glob(pattern)) if "*" in pattern else [pattern])]
        shards = [Path(name) for name in named]
        if missing := [name for name in named if not Path(name).is_file()]:
            here = [p.name for p in path.parent.glob("*.tar")]
            found = f"{path.parent} holds {few(sorted(here))}" if here else f"{path.parent} holds no .tar files"
            raise DataError(f"{len(missing)} of {len(named)} shards do not exist: {few(missing)} ({found})")
    if not shards:
        compressed = [p.name for p in (path if path.is_dir() else path.parent).glob("*.t*gz")]
        hint = f"; it holds {few(compressed)}: unpack these to .tar, images are compressed already" if compressed else ""
        raise DataError(f"no WebDataset shards (.tar files) at {path}{hint}")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expand braces: "x-{08..10}.tar" -> ["x-08.tar", "x-09.tar", "x-10.tar"]; "{a,b}" likewise, also several."""
    found = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first, last, names = found.groups()
    count = 0 if names else int(last) - int(first) + 1
    rests = expand_braces(pattern[found.end() :])
    if count * len(rests) > MAX_SHARDS:
        raise DataError(f"{pattern} names {count * len(rests):,} shards; at most {MAX_SHARDS:,} are accepted")
    choices = names.split(",") if names else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [pattern[: found.start()] + choice + rest for choice, rest in itertools.product(choices, rests)]


def list_samples(shards: list[Path], classes: list[str] | None, left_out: Counter[str] | None = None) -> Listing:
    """List every sample of some shards with its class name.

    Args:
        classes: names by class number, if they are known.
        left_out: counts, by kind, the files that belong to no sample.

    Raises:
        DataError: a damaged shard, a sample without label or with one that is not in `classes`, or a file twice in a shard.
    """
    listing, unlabelled = Listing([], []), []
    for shard in shards:
        images, labels = _index(shard, Counter() if left_out is None else left_out)
        unlabelled += [f"{shard.name}/{member.name}" for key, member in images.items() if key not in labels]
        for key, member in images.items():
            if key in labels:
                listing.samples.append(member)
                listing.labels.append(_class_name(labels[key], classes, f"{shard}/{member.name}"))
    if unlabelled:
        what = "have no label (KEY.cls, or KEY.json with label or cls)"
        raise DataError(f"{len(unlabelled)} of {len(unlabelled) + len(listing.samples)} samples {what}: {few(unlabelled)}")
    if not listing.samples:
        raise DataError(f"{few([shard.name for shard in shards])}: no images inside (KEY.jpg, KEY.png, KEY.webp, ...)")
    return listing


def _index(shard: Path, left_out: Counter[str]) -> tuple[dict[str, Member], dict[str, Any]]:
    """Return a shard's images and labels by key; count the files of samples without an image that can be read."""
    images: dict[str, Member] = {}
    labels: dict[str, Any] = {}
    others: list[tuple[str, str]] = []
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
            for place in _members(tar, shard):
                folder, slash, name = place.name.rpartition("/")
                if name.startswith("."):
                    continue
                stem, _, endings = name.partition(".")
                key, kind = folder + slash + stem, endings.rpartition(".")[2].lower()
                if kind in EXTENSIONS:
                    if key in images:
                        raise DataError(f"{shard} has two images of one key: {images[key].name} and {place.name}")
                    images[key] = place
                elif kind in ("cls", "json") and (label := _read_label(file, place, kind)) is not None:
                    labels[key] = label
                else:
                    others.append((key, kind or "without an ending"))
            _check_end(file, tar.offset, shard)  # type: ignore[attr-defined]
    except (OSError, ValueError, OverflowError, RecursionError, tarfile.TarError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shard} is not a whole tar file ({error}); write or download it again (compressed ones are not read)") from error
    left_out.update(f".{kind}" if " " not in kind else kind for key, kind in others if key not in images)
    return images, labels


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[Member]:
    """Yield the files of an archive.

    Raises:
        DataError: a header that leads back, or out of the archive, or to a file with holes, whose bytes are not in one piece.
    """
    size, before = shard.stat().st_size, -1
    while (info := tar.next()) is not None:
        if info.offset <= before or info.size < 0 or info.offset_data < info.offset:
            raise DataError(f"{shard} is damaged at byte {info.offset:,}; write or download it again")
        before = info.offset
        if info.issparse() or (info.isreg() and info.offset_data + info.size > size):
            what = "has holes (is sparse)" if info.issparse() else "is not wholly inside"
            raise DataError(f"{shard} is not a whole tar file: {info.name!r} {what}; write or download it again")
        if info.isreg():
            yield Member(str(shard), info.offset_data, info.size, info.name)


class _Bounded(io.RawIOBase):
    """A file of which at most the bytes that it has are read, so that a header with a huge size takes no memory.

    Args:
        file: opened for reading, at its beginning.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.file.tell())
        return self.file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and not 0 <= offset <= self.size + (1 << 20):
            raise tarfile.ReadError(f"it leads to byte {offset:,} of {self.size:,}")
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _check_end(file: BinaryIO, offset: int, shard: Path) -> None:
    """Raise DataError for a damaged end, which tarfile does not report: it treats it like the zeros that end an archive."""
    file.seek(offset)
    rest = file.read(1 << 16)
    if not rest or rest.strip(b"\0"):
        what = f"damaged at byte {offset:,}" if rest else f"cut off at byte {offset:,} (its end mark is missing)"
        raise DataError(f"{shard} is {what}; write or download it again")


def _read_label(file: BinaryIO, place: Member, kind: str) -> Any:
    """Return the class number or name in a .cls or .json member; None for JSON without one."""
    if place.size > MAX_LABEL_BYTES:
        raise DataError(f"{place.shard}/{place.name} has {place.size:,} bytes, too many for a label")
    file.seek(place.offset)
    try:
        text = file.read(place.size).decode("utf-8").strip()
        if kind == "cls":
            return text
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place.shard}/{place.name} is not {'text' if kind == 'cls' else 'JSON'}: {error}") from error
    return next((value[key] for key in ("label", "cls") if key in value), None) if isinstance(value, dict) else value


def _class_name(label: Any, classes: list[str] | None, where: str) -> str:
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise DataError(f"{where}: its label must be a class number or name, got {label!r}")
    if isinstance(label, str) and len(label) > MAX_NAME:
        raise DataError(f"{where}: its label has {len(label):,} characters; a class name has at most {MAX_NAME}")
    number = int(label) if isinstance(label, int) or re.fullmatch(r"-?\d+", label) else None
    if number is not None and (number < 0 or (classes is not None and number >= len(classes))):
        accepted = f"0 to {len(classes) - 1} ({len(classes)} classes are listed)" if classes else "0 and above"
        raise DataError(f"{where}: label {number} is out of range; accepted: {accepted}")
    if number is not None:
        return classes[number] if classes else str(number)
    if classes is not None and label not in classes:
        raise DataError(f"{where}: class {label!r} is not among the {len(classes)} listed classes{nearest(str(label), classes)}")
    return str(label)


def _read_classes(shard: Path) -> list[str] | None:
    """Return class names from classes.txt or classes.json in a shard's folder, or in the parent (for train/ and val/)."""
    for folder in (shard.parent, shard.parent.parent):
        try:
            if (file := folder / "classes.txt").is_file():
                return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if (file := folder / "classes.json").is_file():
                value = json.loads(file.read_text(encoding="utf-8-sig"))
                names = sorted(value, key=value.__getitem__) if isinstance(value, dict) else value
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise ValueError("it should hold a list of names, or numbers by name")
                return names
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot read the classes in {file}: {error}") from error
    return None
