"""Images without labels, for objectives that need no labels."""

from __future__ import annotations

from pathlib import Path

from vitarium.data.folders import FileImages, find_images
from vitarium.data.image_set import ImageData, Subset, View, stratified_split
from vitarium.data.opening import EMBEDDED, open_data
from vitarium.errors import DataError


def open_pictures(spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None) -> ImageData:
    """Open all images of a data set, with 0 as their class.

    Args:
        spec: a folder with images at any depth (train/ and val/ at its top are kept apart), or anything that `open_data` accepts, whose
            classes are ignored.
        seed, val_fraction: of the held-out part, if the data have none.
        image_size: of rendered or cropped images.

    Raises:
        DataError: there are fewer than two images.
    """
    path = Path(spec.removeprefix("folder:"))
    if spec.partition(":")[0] in EMBEDDED or not path.is_dir() or not (spec.startswith("folder:") or next(find_images(path), None)):
        data = open_data(spec, seed=seed, val_fraction=val_fraction, image_size=image_size)
        train, val = (View(part, targets=[0] * len(part)) for part in (data.train, data.val))
        return ImageData(data.name, train, val, [], data.image_size)
    parts = {part: sorted(find_images(path / part)) for part in ("train", "val") if (path / part).is_dir()}
    if len(parts) == 2 and all(parts.values()):
        sets = [FileImages(files, [0] * len(files)) for files in parts.values()]
        return ImageData(path.resolve().name, sets[0], sets[1], [])
    files = sorted(find_images(path))
    if len(files) < 2:
        raise DataError(
            f"{path} holds {len(files) or 'no'} image{'' if len(files) == 1 else 's'}; at least two are needed, one of them held out"
        )
    everything = FileImages(files, [0] * len(files))
    kept, held_out = stratified_split(everything.targets, val_fraction, seed)
    return ImageData(path.resolve().name, Subset(everything, kept), Subset(everything, held_out), [])
