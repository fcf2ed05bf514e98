"""Data sets of Hugging Face's `datasets` library, saved with `save_to_disk`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.data.bad_files import BrokenImage
from vitarium.data.image_set import ImageData, Samples
from vitarium.data.images import decode_image, open_image
from vitarium.data.parts import Listing, assemble, few, find_parts
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


def open_saved(path: Path, *, seed: int = 0, val_fraction: float = 0.2, split: str | None = None) -> ImageData:
    """Open a `Dataset` or `DatasetDict` saved with `save_to_disk`.

    The image and label columns are found by their types (`Image`, `ClassLabel`), the parts by their names (train; validation, val, ...,
    test); if there is no held-out part, one is split off with a fixed seed. Rows without a label (-1 or none) are left out, and so is a
    part in which no row has one; class names without images are left out, too. The notes count what is left out.

    Args:
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataError: it cannot be read, lacks such columns, has other values than labels, or cannot be used.
    """
    datasets = require("datasets", "data")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library's errors have no common base
        raise DataError(f"cannot read the saved data set {path}: {error}") from error
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    found = find_parts(splits) if isinstance(loaded, dict) else {"": ""}
    if not found or (split is None and not {"", "train"} & found.keys()):
        raise DataError(f"{path} has no train split; it has {few(list(splits))}")
    name, parts, listings, notes = path.resolve().name, {}, {}, []
    classes: list[str] | None = None
    for part, key in found.items():
        dataset, shown = splits[key], key or "train"
        try:
            image, label = _columns(dataset, f"{path} ({shown})", datasets)
        except DataError as error:
            if part in ("", "train") or split == part:
                raise
            notes.append(f"{error}; the part is not used")
            continue
        parts[shown] = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image
        names = getattr(dataset.features[label], "names", None)
        classes = classes or names
        labels = _labels(dataset[label], names, f"{path} ({shown})")
        rows = [row for row, value in enumerate(labels) if value is not None]
        if len(rows) < len(labels):
            whole = "; the part is not used" if not rows else ""
            notes.append(f"{path} ({shown}): {len(labels) - len(rows)} of {len(labels)} rows have no label and are left out{whole}")
        if rows or part in ("", "train"):
            listings[part] = Listing([(shown, row) for row in rows], [str(labels[row]) for row in rows])
    if unused := [key for key in splits if key not in found.values()]:
        notes.append(f"{path}: splits that are no part of the data are left out: {few(unused)}")
    read, name_of = functools.partial(_read, name=name, parts=parts), functools.partial(_name_of, name=name)
    make = functools.partial(Samples, read=read, name=name_of)
    return assemble(name, make, listings, classes=classes, seed=seed, val_fraction=val_fraction, split=split, notes=notes)


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


def _labels(column: Any, names: list[str] | None, where: str) -> list[str | None]:
    """Return the class names of all rows; None for a row without label (-1, none or empty)."""
    labels: list[str | None] = []
    for row, value in enumerate(column):
        if value is None or value == "" or (value == -1 and not isinstance(value, bool)):
            labels.append(None)
            continue
        known = isinstance(value, int | str) and not isinstance(value, bool)
        if not known or (names is not None and not (isinstance(value, int) and 0 <= value < len(names))):
            accepted = f"0 to {len(names) - 1}" if names else "class numbers or names"
            raise DataError(f"{where}: row {row} has the label {value!r}; accepted: {accepted}, and -1 for none")
        labels.append(names[int(value)] if names is not None else str(value))
    return labels
