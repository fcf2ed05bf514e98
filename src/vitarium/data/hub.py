"""Data sets of Hugging Face's `datasets` library, saved with `save_to_disk`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.data.bad_files import BrokenImage
from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import decode_image, open_image
from vitarium.data.parts import Listing, assemble, few, part_names
from vitarium.errors import DataError, require

if TYPE_CHECKING:
    from PIL import Image

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target")


def _read(place: tuple[str, int], name: str, parts: dict[str, tuple[Any, str]]) -> Image.Image:
    """Open the image at (split name, row); `parts` holds split name -> (`datasets.Dataset` with undecoded images, its image column)."""
    part, row = place
    dataset, column = parts[part]
    stored = dataset[row][column] or {}
    if stored.get("bytes") is not None:
        return decode_image(stored["bytes"], _name_of(place, name))
    if stored.get("path"):
        return open_image(stored["path"])
    raise BrokenImage(_name_of(place, name), "the row has no image")


def _name_of(place: tuple[str, int], name: str) -> str:
    return f"{name}/{place[0]}[{place[1]}]"


def open_saved(path: Path, *, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Open a `Dataset` or `DatasetDict` saved with `save_to_disk`.

    The image and label columns are found by their types (`Image`, `ClassLabel`), the parts by their names (train; validation, val, ...,
    test); if there is no held-out part, one is split off with a fixed seed.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataError: it cannot be read, lacks such columns, has rows without label, or cannot be trained on.
    """
    datasets = require("datasets", "data")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library's errors have no common base
        raise DataError(f"cannot read the saved data set {path}: {error}") from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    train, val = part_names(splits)
    if train is None:
        raise DataError(f"{path} has no train split; it has {few(list(splits))}")
    name, parts, listings = path.resolve().name, {}, {}
    classes: list[str] | None = None
    for split in (train, val) if val else (train,):
        dataset = splits[split]
        image, label = _columns(dataset, f"{path} ({split})", datasets)
        parts[split] = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image
        names = getattr(dataset.features[label], "names", None)
        classes = classes or names
        listings[split] = Listing([(split, row) for row in range(len(dataset))], _labels(dataset[label], names, f"{path} ({split})"))
    read, name_of = functools.partial(_read, name=name, parts=parts), functools.partial(_name_of, name=name)
    make = functools.partial(Samples, read=read, name=name_of)
    held_out = listings[val] if val else None
    return assemble(name, make, listings[train], held_out, classes=classes, seed=seed, val_fraction=val_fraction)


def _columns(dataset: Any, where: str, datasets: Any) -> tuple[str, str]:
    """Find the image and the label column."""
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in features if name.lower() in LABEL_COLUMNS]
    preferred = [name for name in labels if name in LABEL_COLUMNS] or labels
    if not images or not preferred:
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise DataError(f"{where} needs a column of type Image and one of type ClassLabel; it has {found or 'no columns'}")
    if len(images) > 1 or (len(labels) > 1 and preferred == labels):
        several = images if len(images) > 1 else labels
        raise DataError(f"{where} has several candidate columns ({few(several)}); keep one: dataset.remove_columns(...)")
    return images[0], preferred[0]


def _labels(column: Any, names: list[str] | None, where: str) -> list[str]:
    """Return the class names of all rows."""
    labels = []
    for row, value in enumerate(column):
        known = isinstance(value, int | str) and not isinstance(value, bool) and value != ""
        if not known or (names is not None and not (isinstance(value, int) and 0 <= value < len(names))):
            accepted = f"0 to {len(names) - 1}" if names else "class numbers or names"
            raise DataError(f"{where}: row {row} has the label {value!r}; accepted: {accepted}")
        labels.append(names[value] if names is not None else str(value))
    return labels
