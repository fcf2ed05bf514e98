"""WebDataset shards: tar files with random access, so that order and resuming are exact, as with single files.

A sample consists of the files of one shard that share a key, the path up to the first dot: `key.jpg` with `key.cls` (a class number or
name) or `key.json` (with "label" or "cls"). Headers are read once, when the shards are opened; images when they are accessed.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import EXTENSIONS, decode_image, read_bytes
from vitarium.data.parts import TRAIN_NAMES, VAL_NAMES, Listing, assemble, few, part_names
from vitarium.errors import DataError, nearest

if TYPE_CHECKING:
    from PIL import Image

MAX_LABEL_BYTES = 1 << 20


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


def open_shards(path: Path, *, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Open a folder of .tar files, one with train/ and val/ below, or a pattern such as "x-{000..009}.tar".

    Shards with "train" and "val" (or "valid", ..., "test") in their names or folders are the two parts; else a part is held out with a
    fixed seed. Class names come from classes.txt (one per line) or classes.json (a list, or {name: number}) beside the shards; else the
    labels are the names.

    Raises:
        DataError: no shards, a damaged one, samples without label, unknown labels, or data that cannot be trained on.
    """
    shards = find_shards(path)
    folders = {shard.parent for shard in shards}
    words = {shard: _part(shard.name) or (_part(shard.parent.name) if len(folders) > 1 else None) for shard in shards}
    train, val = part_names({word for word in words.values() if word})
    if train and val and (neither := [shard.name for shard in shards if words[shard] is None]):
        raise DataError(f"some shards in {path} are named {train} and {val}, but these neither: {few(neither)}; rename or remove them")
    classes = _read_classes(shards[0])
    listings = {}
    for part in (train, val) if train and val else (None,):
        chosen = [shard for shard in shards if part is None or words[shard] == part]
        listings[part] = list_samples(chosen, classes)
    name = (path if path.is_dir() else path.parent).resolve().name
    first, *held_out = listings.values()
    rest = held_out[0] if held_out else None
    return assemble(
        name, functools.partial(Samples, read=_read, name=_name_of), first, rest, classes=classes, seed=seed, val_fraction=val_fraction
    )


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
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first, last, names = found.groups()
    choices = names.split(",") if names else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    rests = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + choice + rest for choice, rest in itertools.product(choices, rests)]


def list_samples(shards: list[Path], classes: list[str] | None) -> Listing:
    """List every sample of some shards with its class name.

    Raises:
        DataError: a damaged shard, a sample without label or with one that is not in `classes`, or a file twice in a shard.
    """
    listing, unlabelled = Listing([], []), []
    for shard in shards:
        images, labels = _index(shard)
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


def _index(shard: Path) -> tuple[dict[str, Member], dict[str, Any]]:
    """Return a shard's images and labels by key."""
    images: dict[str, Member] = {}
    labels: dict[str, Any] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                folder, slash, name = info.name.rpartition("/")
                if not info.isreg() or name.startswith("."):
                    continue
                stem, _, endings = name.partition(".")
                key, kind = folder + slash + stem, endings.rpartition(".")[2].lower()
                place = Member(str(shard), info.offset_data, info.size, info.name)
                if kind in EXTENSIONS:
                    if key in images:
                        raise DataError(f"{shard} has two images of one key: {images[key].name} and {info.name}")
                    images[key] = place
                elif kind in ("cls", "json") and (label := _read_label(file, place, kind)) is not None:
                    labels[key] = label
            _check_end(file, tar.offset, shard)  # type: ignore[attr-defined]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard} is not a whole tar file ({error}); write or download it again (compressed ones are not read)") from error
    return images, labels


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
    number = int(label) if isinstance(label, int) or re.fullmatch(r"-?\d+", label) else None
    if number is not None and (number < 0 or (classes is not None and number >= len(classes))):
        accepted = f"0 to {len(classes) - 1} ({len(classes)} classes are listed)" if classes else "0 and above"
        raise DataError(f"{where}: label {number} is out of range; accepted: {accepted}")
    if number is not None:
        return classes[number] if classes else str(number)
    if classes is not None and label not in classes:
        raise DataError(f"{where}: class {label!r} is not among the {len(classes)} listed classes{nearest(str(label), classes)}")
    return str(label)


def _part(name: str) -> str | None:
    """Return the first word in a file's or folder's name that names a part: "imagenet-train-0001.tar" -> "train"."""
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if word in (*TRAIN_NAMES, *VAL_NAMES)), None)


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
