"""Pictures without labels: for objectives that need none."""

from __future__ import annotations

from pathlib import Path

from vitarium.data.folders import FileImages, find_images
from vitarium.data.image_set import ImageData, Subset, stratified_split
from vitarium.data.opening import EMBEDDED, open_data
from vitarium.errors import DataError


def open_pictures(spec: str, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None) -> ImageData:
    """All pictures of a data set, with 0 for their class.

    Args:
        spec: a folder with pictures at any depth (train/ and val/ at its top are kept apart); or anything that `open_data` takes, whose
            classes are then left aside.
        seed, val_fraction: of the part that is held out, where the data has none.
        image_size: of pictures that are drawn or cropped.

    Raises:
        DataError: there is nothing, or fewer than two pictures.
    """
    path = Path(spec.removeprefix("folder:"))
    if spec.partition(":")[0] in EMBEDDED or not path.is_dir() or not (spec.startswith("folder:") or next(find_images(path), None)):
        data = open_data(spec, seed=seed, val_fraction=val_fraction, image_size=image_size)
        return ImageData(data.name, Unlabelled(data.train), Unlabelled(data.val), [], data.image_size)
    parts = {part: sorted(find_images(path / part)) for part in ("train", "val") if (path / part).is_dir()}
    if len(parts) == 2 and all(parts.values()):
        train, val = (FileImages(files, [0] * len(files)) for files in parts.values())
        return ImageData(path.resolve().name, train, val, [])
    files = sorted(find_images(path))
    if len(files) < 2:
        raise DataError(
            f"{path} holds {len(files) or 'no'} picture{'' if len(files) == 1 else 's'}; two or more are needed, one to be held out"
        )
    everything = FileImages(files, [0] * len(files))
    kept, held_out = stratified_split(everything.targets, val_fraction, seed)
    return ImageData(path.resolve().name, Subset(everything, kept), Subset(everything, held_out), [])


class Unlabelled:
    """An image set whose samples all have the class 0."""

    def __init__(self, images: object):
        self.images = images
        self.targets = [0] * len(images)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.images[index][0], 0  # type: ignore[index]

    def describe(self, index: int) -> str:
        """As the set does."""
        return self.images.describe(index)  # type: ignore[attr-defined]
