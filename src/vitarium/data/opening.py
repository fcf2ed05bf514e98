"""Opening of data sets: from a name or a path to a training and a held-out part."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

from vitarium.data.image_set import ImageData
from vitarium.data.parts import chosen, find_parts
from vitarium.data.scan import subfolders
from vitarium.errors import DataError, UsageError, nearest

KINDS_OF_LABELS = {
    "image": "vitarium.data.unlabelled:open_images",
    "multilabel": "vitarium.data.multilabel:open_multilabel",
    "retrieval": "vitarium.data.retrieval:open_retrieval",
    "pairs": "vitarium.data.pairs:open_pairs",
    "panoptic": "vitarium.data.segments:open_panoptic",
    "semantic": "vitarium.data.segments:open_semantic",
    "instance": "vitarium.data.segments:open_instance",
}
"""Kinds of labels other than classes -> the function that opens the data: (spec, *, seed, val_fraction, image_size, split) -> ImageData."""

LABELS_OF_TASKS = {
    "classify": "class",
    "generate": "class",
    "segment": "panoptic",
    "restore": "pairs",
    "retrieve": "retrieval",
    "autoencode": "image",
    "encode": "image",
    "explain": "image",
    "pretrain": "image",
    "reconstruct": "image",
}
"""Name of a task -> its kind of labels, if the two names differ. A test compares this with the tasks themselves."""
log = logging.getLogger("vitarium")
_logged: set[str] = set()

EMBEDDED = ("fashion", "digits", "photos", "scenes")
WITH_OPTIONS = ("fashion", "scenes")
"""Embedded data sets that take options after a colon."""
EMBEDDED_PREFIX = "embedded:"
"""Begins the name of an embedded data set where a folder of the same name exists."""
EMBEDDED_OF_KIND = {"multilabel": ("scenes",), "pairs": ("photos",), **dict.fromkeys(("panoptic", "semantic", "instance"), ("scenes",))}
"""Kinds of labels that not all embedded data sets have -> those that have them."""
KINDS = ("folder", "csv", "wds", "hf")
ACCEPTED = (
    "accepted: fashion[:all], digits, photos, scenes[:KEY=VALUE,...], or embedded:NAME of these; or a path to a folder of class folders "
    "(or of train/ and val/ or test/), to WebDataset shards (a folder of .tar files, or name-{000..009}.tar), to a Hugging Face data "
    "set written by save_to_disk, or to a CSV file with columns path and label"
)


def open_data(
    spec: str | os.PathLike[str],
    *,
    task: str = "class",
    seed: int = 0,
    val_fraction: float = 0.2,
    image_size: int | None = None,
    split: str | None = None,
) -> ImageData:
    """Open a data set: for classification, or with the labels of another task.

    What was left out, ignored or assumed is logged, each sentence once in a process, and is in the data's `notes`.

    Args:
        spec: "fashion" (10,000 images of clothes; "fashion:all" 70,000), "digits" (scikit-learn's handwriting), "photos" (crops of real
            photographs), "scenes" (rendered on demand, with options: "scenes:length=5000,task=class"); or a path: a folder of class
            folders, one with train/ and val/ of them, WebDataset shards ("shards/", "x-{000..009}.tar"), a Hugging Face data set saved with
            `save_to_disk`, a CSV file with columns path and label. The kind of a path is recognised; a prefix "folder:", "csv:", "wds:" or
            "hf:" forces it. Where a folder has the name of an embedded data set, "embedded:photos" is the data set and "./photos" the
            folder; "photos" alone is refused.
        task: a kind of labels ("class", "image": none, or another of `KINDS_OF_LABELS`, each documented in its
            function), or the name of a task ("classify", "segment", "restore", ...).
        seed: of the split, if the data has none, and of rendered data.
        val_fraction: share that is held out, if the data has no split.
        image_size: side of images that are rendered or cropped, pixels; None: their own default. Images from files keep their size.
        split: None for training, which needs two parts with the same classes. For an evaluation the part that becomes `val`: "val", "test",
            "train", "all", or "auto": the held-out part if the data has one, else every labelled image; `train` may then be empty.

    Raises:
        DataError: there is no such data, or it cannot be trained on or evaluated.
        UsageError: an option of "fashion" or "scenes", a task, or a part that does not exist; or a name that is both an embedded data set
            and a folder.
    """
    labels = LABELS_OF_TASKS.get(task, task)
    if labels != "class" and labels not in KINDS_OF_LABELS:
        known = ["class", *KINDS_OF_LABELS, *LABELS_OF_TASKS]
        raise UsageError(f"no data has labels of the kind {task!r}{nearest(task, known)} (accepted: {', '.join(known)})")
    text = _meant(os.fspath(spec), labels)
    if labels != "class":
        module, _, function = KINDS_OF_LABELS[labels].partition(":")
        opened = getattr(importlib.import_module(module), function)
        data: ImageData = opened(text, seed=seed, val_fraction=val_fraction, image_size=image_size, split=split)
    else:
        data = open_classes(text, seed=seed, val_fraction=val_fraction, image_size=image_size, split=split)
    for note in data.notes:
        if note not in _logged:  # a command may open its data more than once
            log.warning("%s", note)
            _logged.add(note)
    return data


def embedded(name: str) -> str:
    """Return the data that a default names: "embedded:NAME" where a folder has the name of an embedded data set, else the name."""
    return f"{EMBEDDED_PREFIX}{name}" if name in EMBEDDED and Path(name).is_dir() else name


def _meant(spec: str, labels: str) -> str:
    """Return the data that are meant: without the prefix "embedded:".

    Raises:
        UsageError: an embedded data set that does not exist or lacks labels of this kind, or the name of one that is a folder, too.
    """
    known = EMBEDDED_OF_KIND.get(labels, EMBEDDED)
    if spec.startswith(EMBEDDED_PREFIX):
        name = spec.removeprefix(EMBEDDED_PREFIX)
        if (bare := name.partition(":")[0]) not in known:
            hint = f"{nearest(bare, known)} (those that have: {', '.join(known)})"
            raise UsageError(f"no embedded data set {bare!r} has labels of the kind {labels!r}{hint}")
        return name
    if spec in known and Path(spec).is_dir():
        raise UsageError(
            f"{spec!r} is the name of an embedded data set and of a folder here: write {EMBEDDED_PREFIX}{spec} for the data set, or "
            f".{os.sep}{spec} for the folder"
        )
    return spec


def open_classes(text: str, *, seed: int, val_fraction: float, image_size: int | None, split: str | None) -> ImageData:
    """Open data with one class per image. See `open_data`."""
    kind, colon, rest = text.partition(":")
    if kind in WITH_OPTIONS or (kind in EMBEDDED and not colon):
        share = 0.2 if split is not None and val_fraction == 1 else val_fraction
        return chosen(_embedded(kind, rest, seed, share, image_size), split, val_fraction)
    division: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction, "split": split}
    forced = kind in KINDS and bool(colon)
    path = Path(rest if forced else text)
    kind = kind if forced else _recognise(path, text)
    if kind == "csv":
        from vitarium.data.folders import open_table
        from vitarium.data.tables import TableOptions, parse_options

        return open_table(*(parse_options(rest) if forced else (path, TableOptions())), **division)
    if kind == "wds":
        from vitarium.data.shards import open_shards

        return open_shards(path, **division)
    if kind == "hf":
        from vitarium.data.hub import open_saved

        return open_saved(path, **division)
    from vitarium.data.folders import open_folder

    return open_folder(path, **division)


def _embedded(kind: str, options: str, seed: int, val_fraction: float, image_size: int | None) -> ImageData:
    if kind == "fashion":
        from vitarium.data.fashion import open_fashion

        return open_fashion(options)
    if kind == "digits":
        from vitarium.data.digits import open_digits

        return open_digits(seed=seed, val_fraction=val_fraction)
    if kind == "photos":
        from vitarium.data.photos import open_photos

        return open_photos(image_size=image_size, seed=seed, val_fraction=val_fraction)
    from vitarium.data.scenes import open_scenes

    return open_scenes(options, image_size=image_size, seed=seed, val_fraction=val_fraction)


def _recognise(path: Path, spec: str) -> str:
    """Return the kind of data at a path: "folder", "csv", "wds" or "hf"."""
    if not spec:
        raise DataError(f"no data was given\n{ACCEPTED}")
    if path.suffix == ".tar":
        return "wds"
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return "csv"
        raise DataError(f"{spec} is a single file that cannot be read as a data set\n{ACCEPTED}")
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
        raise DataError(f"there is no data called {spec!r}{nearest(path.name, [*EMBEDDED, *siblings])}\n{ACCEPTED}")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return "hf"
    folders = subfolders(path)
    places = [path / part for part in find_parts(folders).values()] if folders else [path]
    return "wds" if any(next(place.glob("*.tar"), None) for place in places) else "folder"
