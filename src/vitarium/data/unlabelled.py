"""Images without labels, for objectives that need no labels."""

from __future__ import annotations

from pathlib import Path

from vitarium.data.folders import FileImages
from vitarium.data.image_set import ImageData, View, stratified_split
from vitarium.data.opening import EMBEDDED, open_classes
from vitarium.data.parts import divide, few, find_parts
from vitarium.data.scan import scan, subfolders
from vitarium.errors import DataError


def open_images(
    spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None, split: str | None = None
) -> ImageData:
    """Open all images of a data set, with 0 as their class.

    Args:
        spec: a folder with images at any depth (the parts train, val, test, ... at its top or one level below are kept apart), or anything
            that `open_data` accepts, whose classes are ignored.
        seed, val_fraction: of the held-out part, if the data have none.
        image_size: of rendered or cropped images.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: there are fewer than two images.
    """
    path = Path(spec.removeprefix("folder:"))
    listed = None
    if spec.partition(":")[0] not in EMBEDDED and path.is_dir():
        listed, notes = image_parts(path)
    if not listed or not (any(listed.values()) or spec.startswith("folder:")):
        data = open_classes(spec, seed=seed, val_fraction=val_fraction, image_size=image_size, split=split)
        train, val = (View(part, targets=[0] * len(part)) for part in (data.train, data.val))
        return ImageData(data.name, train, val, [], data.image_size, data.notes, data.part, data.drawn)
    count = sum(map(len, listed.values()))
    if count < 2 and split is None:
        raise DataError(f"{path} holds {count or 'no'} image{'' if count == 1 else 's'}; at least two are needed, one of them held out")

    def random_split(files: list[str]) -> tuple[list[str], list[str]]:
        kept, held_out = stratified_split([0] * len(files), val_fraction, seed)
        return [files[i] for i in kept], [files[i] for i in held_out]

    name = path.resolve().name
    found = divide(name, listed, random_split, val_fraction=val_fraction, split=split)
    if not found.val:
        raise DataError(f"{path} holds no images in the part {found.part}")
    sets = [FileImages(files, [0] * len(files)) for files in (found.train, found.val)]
    return ImageData(name, sets[0], sets[1], [], notes=(*notes, *found.notes), part=found.part, drawn=found.drawn)


def image_parts(path: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """List the images of a folder, at any depth, by part; and return notes on what was left out.

    The parts are folders at the top or one level below (images/train, images/val). Beside a folder for training, what is in none of the
    parts is left out; without one it is the training part. All is under "" if there are no parts with images.
    """
    places = _part_folders(path)
    found = scan([*places.values(), path], path)
    listed = {part: found.images[place] for part, place in places.items() if found.images[place]}
    rest, notes = found.images[path], list(found.notes(path))
    if not listed:
        return {"": rest}, tuple(notes)
    if "train" in listed and rest:
        names = ", ".join(str(place.relative_to(path)) for place in places.values())
        notes.append(f"{path}: {len(rest)} images outside of its parts ({names}) are left out, such as {few(rest, 1)}")
    elif rest:
        listed = {"train": rest, **listed}
    return listed, tuple(notes)


def _part_folders(path: Path) -> dict[str, Path]:
    """Return part -> folder, from the first of the folder and its subfolders that holds some."""
    own = subfolders(path)
    if at_top := find_parts(own):
        return {part: path / name for part, name in at_top.items()}
    for name in own:
        below = find_parts(subfolders(path / name))
        if len(below) > 1 and "train" in below:
            return {part: path / name / inside for part, inside in below.items()}
    return {}
