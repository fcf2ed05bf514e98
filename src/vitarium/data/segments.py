"""Open images with segments for panoptic, semantic or instance segmentation: rendered scenes, COCO json, folders of PNG masks."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitarium.assignments import split_assignment
from vitarium.data.image_set import Samples, View
from vitarium.data.joint import Segmentation
from vitarium.data.parts import chosen
from vitarium.data.segmented import Kind, SegmentedData, keep_classes, merge_classes, one_kind_of_thing
from vitarium.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image

ACCEPTED = (
    "accepted: scenes[:KEY=VALUE,...]; a COCO json file, or a folder with annotations/*.json and the images beside it; "
    "or a folder with images/ and masks/ (or annotations/) and classes.txt (or ADE20K's objectInfo150.txt)"
)


def open_panoptic(spec: str, **options: Any) -> SegmentedData:
    """Open data with one segment for each thing and one for each class of stuff. See `open_segments`."""
    return open_segments(spec, "panoptic", **options)


def open_semantic(spec: str, **options: Any) -> SegmentedData:
    """Open data with one segment per class and no instances. See `open_segments`."""
    return open_segments(spec, "semantic", **options)


def open_instance(spec: str, **options: Any) -> SegmentedData:
    """Open data with one segment for each thing and no stuff. See `open_segments`."""
    return open_segments(spec, "instance", **options)


def open_segments(
    spec: str, kind: Kind, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None, split: str | None = None
) -> SegmentedData:
    """Open images with segments.

    Args:
        spec: "scenes", with options as "scenes:length=5000,image_size=64"; a COCO json file (panoptic or instances) or a folder with
            annotations/; a folder with images/ and masks/ of PNGs and classes.txt. A prefix "coco:" or "masks:" selects the format; options
            follow after a comma: "coco:DIR,broken=drop" skips invalid entries, "masks:DIR,void=0" makes 0 the value of unlabelled pixels,
            "masks:DIR,map=255:1" reads the value 255 as class 1.
        kind: "panoptic", "semantic" or "instance".
        seed, val_fraction: of the validation split, if the data has none.
        image_size: side of rendered images, pixels.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: no such data, no samples, or invalid files; the message names the first ten.
        UsageError: an option that does not exist.
    """
    prefix, colon, rest = spec.partition(":")
    if prefix == "scenes":
        share = 0.2 if val_fraction == 1 and split is not None else val_fraction
        drawn = _as_kind(kind, open_scene_segments(rest, image_size=image_size, seed=seed, val_fraction=share))
        return chosen(drawn, split, val_fraction)  # type: ignore[return-value]  # of the same class
    division: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction, "split": split}
    forced = bool(colon) and prefix in ("coco", "masks")
    text, *options = (rest if forced else spec).split(",") if forced or not Path(spec).exists() else [spec]
    path, values = Path(text), _options(options)
    if not spec or not path.exists():
        raise DataError(f"there is no data called {text!r}{nearest(text, ['scenes'])}\n{ACCEPTED}")
    from vitarium.data.coco import find_annotations, open_coco

    if prefix == "coco" or (prefix != "masks" and (path.suffix == ".json" or find_annotations(path))):
        return _as_kind(kind, open_coco(path, kind, broken=values.get("broken", "refuse"), **division))
    from vitarium.data.mask_folders import open_mask_folder

    options_of_masks: dict[str, Any] = {"void": values.get("void"), "mapping": values.get("map"), "broken": values.get("broken", "refuse")}
    return _as_kind(kind, open_mask_folder(path, **options_of_masks, **division))


def _options(options: list[str]) -> dict[str, str]:
    accepted = {"broken": ("refuse", "drop"), "void": ("0", "255"), "map": ("VALUE:CLASS+...",)}
    values = {}
    for option in options:
        known = ", ".join(f"{name}={'|'.join(choices)}" for name, choices in accepted.items())
        key, value = split_assignment(option, f"options of segmentation data are {known}")
        if value not in accepted.get(key, ()) and not (key == "map" and re.fullmatch(r"\d{1,5}:\d{1,5}(\+\d{1,5}:\d{1,5})*", value)):
            raise UsageError(f"segmentation data take no option {option!r}{nearest(key, accepted)} (accepted: {known})")
        values[key] = value
    return values


def _as_kind(kind: Kind, data: SegmentedData) -> SegmentedData:
    if kind == "panoptic":
        return data
    if kind == "semantic":
        merged = functools.partial(View, transform_target=merge_classes)
        return replace(data, train=merged(data.train), val=merged(data.val), things=())
    if not data.things:
        raise DataError(f"{data.name} has no classes with instances (things); use it for semantic segmentation")
    only = functools.partial(View, transform_target=functools.partial(keep_classes, classes=data.things))
    classes = [data.classes[c] for c in data.things]
    return replace(data, train=only(data.train), val=only(data.val), classes=classes, things=tuple(range(len(classes))))


def open_scene_segments(options: str = "", *, image_size: int | None = None, seed: int = 0, val_fraction: float = 0.2) -> SegmentedData:
    """Open rendered scenes with all their segments: eight classes of things and six of stuff; every pixel belongs to one segment.

    Args:
        options: "KEY=VALUE,..." of image_size (pixels, 64), length (images in both parts, 2000) and things ("kinds", the eight classes, or
            "one", a single class of all things).

    Raises:
        UsageError: an option or value that is not accepted.
    """
    from vitarium.data.scenes import CATEGORIES, THINGS
    from vitarium.data.scenes.tasks import IMAGE_SIZE, _number, _parse

    values = _parse(options, ("image_size", "length", "things"), "image_size=64, length=2000, things=one")
    if (things := values.get("things", "kinds")) not in ("kinds", "one"):
        raise UsageError(f"things of scenes must be kinds or one, got {things!r}")
    size = _number("image_size", values.get("image_size", image_size or IMAGE_SIZE), least=16)
    length = _number("length", values.get("length", 2000), least=2)
    numbers = list(range(length))
    border = min(max(1, round(length * (1 - val_fraction))), length - 1)
    make = functools.partial(Samples, read=SceneReader(size, seed), name=lambda number: f"scene #{number}")
    parts = make(numbers[:border]), make(numbers[border:])
    data = SegmentedData("scenes-segments", *parts, list(CATEGORIES), size, things=tuple(range(len(THINGS))))
    return data if things == "kinds" else one_kind_of_thing(replace(data, name="scenes-things"))


class SceneReader:
    """Render the image and segments of a scene number, and keep rendered scenes up to `room` bytes."""

    def __init__(self, image_size: int, seed: int, room: int = 256 * 2**20):
        from vitarium.data.scenes import Scenes

        self.scenes, self.room = Scenes(image_size, seed), room
        self._kept: dict[int, tuple[Any, Any, Any]] = {}

    def __call__(self, number: int) -> tuple[Image.Image, Segmentation]:
        from PIL import Image

        if number not in self._kept:
            scene = self.scenes[number]
            segment_map, segments = scene.panoptic
            drawn = scene.image, segment_map.astype(np.uint8), np.array([s["category_id"] for s in segments], np.int64)
            size = sum(part.nbytes for part in drawn)
            if size > self.room:
                return Image.fromarray(drawn[0]), self._segments(*drawn[1:])
            self.room -= size
            self._kept[number] = drawn
        pixels, segment_map, labels = self._kept[number]
        return Image.fromarray(pixels), self._segments(segment_map, labels)

    @staticmethod
    def _segments(segment_map: Any, labels: Any) -> Segmentation:
        return Segmentation(segment_map == np.arange(1, len(labels) + 1, dtype=np.uint8)[:, None, None], labels)
