"""Pictures with segments, for panoptic, semantic and instance segmentation: drawn scenes, COCO's json, folders of PNG masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vitarium.data.image_set import ImageData, ImageSet, stratified_split
from vitarium.data.joint import Segmentation
from vitarium.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["panoptic", "semantic", "instance"]
ACCEPTED = (
    "accepted: scenes[:KEY=VALUE,...]; a COCO json file, or a folder with annotations/*.json and the pictures beside; "
    "or a folder with images/ and masks/ (or annotations/) and classes.txt (or ADE20K's objectInfo150.txt)"
)


@dataclass(frozen=True)
class SegmentedData(ImageData):
    """`ImageData` whose targets are `Segmentation`s.

    Attributes:
        things: numbers of the classes whose instances are told apart; the others are stuff.
    """

    things: tuple[int, ...] = ()


class SegmentedImages:
    """(picture, `Segmentation`) by index; samples are read when they are asked for.

    Args:
        samples: anything.
        read: sample -> picture and its segments; raises BrokenImage.
        describe: sample -> its name.
    """

    def __init__(self, samples: Sequence[Any], read: Callable[[Any], tuple[Image.Image, Segmentation]], describe: Callable[[Any], str]):
        self.samples, self._read, self._describe = samples, read, describe
        self.targets = [0] * len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._read(self.samples[index])

    def describe(self, index: int) -> str:
        """The sample's name."""
        return self._describe(self.samples[index])


class Seen:
    """An image set with its segments told otherwise."""

    def __init__(self, images: ImageSet, change: Callable[[Segmentation], Segmentation]):
        self.images, self.change = images, change
        self.targets = images.targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        picture, target = self.images[index]
        return picture, self.change(target)  # type: ignore[arg-type]

    def describe(self, index: int) -> str:
        """As the set does."""
        return self.images.describe(index)


def open_panoptic(spec: str, **options: Any) -> SegmentedData:
    """Every segment as the data has it: things one by one, stuff by class. See `open_segments`."""
    return open_segments(spec, "panoptic", **options)


def open_semantic(spec: str, **options: Any) -> SegmentedData:
    """One segment a class; no class has instances. See `open_segments`."""
    return open_segments(spec, "semantic", **options)


def open_instance(spec: str, **options: Any) -> SegmentedData:
    """Things alone. See `open_segments`."""
    return open_segments(spec, "instance", **options)


def open_segments(spec: str, kind: Kind, *, seed: int = 0, val_fraction: float = 0.2, image_size: int | None = None) -> SegmentedData:
    """Open pictures with segments.

    Args:
        spec: "scenes", with options as "scenes:length=5000,image_size=64"; a COCO json file (panoptic or instances) or a folder with
            annotations/; a folder with images/ and masks/ of PNGs and classes.txt. A prefix "coco:" or "masks:" forces it; options follow
            after a comma: "coco:DIR,broken=drop" leaves out what is wrong in it, "masks:DIR,void=0" makes 0 the value of nothing.
        kind: "panoptic", "semantic" or "instance".
        seed, val_fraction: of the part that is held out, where the data has none.
        image_size: side of pictures that are drawn, pixels.

    Raises:
        DataError: nothing there, nothing that can be trained on, or files that are wrong; the first ten are named.
        UsageError: an option that does not exist.
    """
    split: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction}
    prefix, colon, rest = spec.partition(":")
    if prefix == "scenes":
        return _seen_as(kind, open_scene_segments(rest, image_size=image_size, **split))
    forced = bool(colon) and prefix in ("coco", "masks")
    text, *options = (rest if forced else spec).split(",") if forced or not Path(spec).exists() else [spec]
    path, values = Path(text), _options(options)
    if not spec or not path.exists():
        raise DataError(f"there is no data called {text!r}{nearest(text, ['scenes'])}\n{ACCEPTED}")
    from vitarium.data.coco import find_annotations, open_coco

    if prefix == "coco" or (prefix != "masks" and (path.suffix == ".json" or find_annotations(path))):
        return _seen_as(kind, open_coco(path, kind, broken=values.get("broken", "refuse"), **split))
    from vitarium.data.mask_folders import open_mask_folder

    return _seen_as(kind, open_mask_folder(path, void=values.get("void"), broken=values.get("broken", "refuse"), **split))


def _options(options: list[str]) -> dict[str, str]:
    accepted = {"broken": ("refuse", "drop"), "void": ("0", "255")}
    values = {}
    for option in options:
        key, _, value = option.partition("=")
        if value not in accepted.get(key, ()):
            known = ", ".join(f"{name}={'|'.join(choices)}" for name, choices in accepted.items())
            raise UsageError(f"data with segments have no option {option!r}{nearest(key, accepted)} (accepted: {known})")
        values[key] = value
    return values


def _seen_as(kind: Kind, data: SegmentedData) -> SegmentedData:
    if kind == "panoptic":
        return data
    if kind == "semantic":
        merged = functools.partial(Seen, change=merge_classes)
        return replace(data, train=merged(data.train), val=merged(data.val), things=())
    if not data.things:
        raise DataError(f"{data.name} has no things, of which instances could be told apart; take it for semantic segmentation")
    only = functools.partial(Seen, change=functools.partial(keep_classes, classes=data.things))
    classes = [data.classes[c] for c in data.things]
    return replace(data, train=only(data.train), val=only(data.val), classes=classes, things=tuple(range(len(classes))))


def merge_classes(target: Segmentation) -> Segmentation:
    """One segment a class, in the order of the classes."""
    labels = np.unique(target.labels)
    masks = np.array([target.masks[target.labels == label].any(0) for label in labels], bool).reshape(-1, *target.masks.shape[1:])
    return Segmentation(masks, labels)


def keep_classes(target: Segmentation, classes: Sequence[int]) -> Segmentation:
    """The segments of some classes, which are numbered by their place among these."""
    kept = np.isin(target.labels, classes)
    numbers = {label: number for number, label in enumerate(classes)}
    labels = np.array([numbers[label] for label in target.labels[kept].tolist()], np.int64)
    return Segmentation(target.masks[kept], labels, target.crowds[kept])


def split_samples(samples: list[Any], val_fraction: float, seed: int, name: str) -> tuple[list[Any], list[Any]]:
    """(training, held-out)

    Raises:
        DataError: fewer than two samples, or a share outside of 0..1.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if len(samples) < 2:
        raise DataError(f"{name} holds {len(samples) or 'no'} pictures with segments; two or more are needed, one to be held out")
    train, val = stratified_split([0] * len(samples), val_fraction, seed)
    return [samples[i] for i in train], [samples[i] for i in val]


def open_scene_segments(options: str = "", *, image_size: int | None = None, seed: int = 0, val_fraction: float = 0.2) -> SegmentedData:
    """Drawn scenes with all their segments: eight kinds of things, six of stuff, every pixel in one of them.

    Args:
        options: "KEY=VALUE,..." of image_size (pixels, 64) and length (pictures in both parts, 2000).

    Raises:
        UsageError: an option or value that is not accepted.
    """
    from vitarium.data.scenes import CATEGORIES, THINGS
    from vitarium.data.scenes.tasks import IMAGE_SIZE, _number, _parse

    values = _parse(options)
    if "task" in values:
        raise UsageError("scenes with segments have no tasks; leave task= out (accepted: image_size=64, length=2000)")
    size = _number("image_size", values.get("image_size", image_size or IMAGE_SIZE), least=16)
    length = _number("length", values.get("length", 2000), least=2)
    numbers = list(range(length))
    border = min(max(1, round(length * (1 - val_fraction))), length - 1)
    make = functools.partial(SegmentedImages, read=SceneReader(size, seed), describe=lambda number: f"scene #{number}")
    parts = make(numbers[:border]), make(numbers[border:])
    return SegmentedData("scenes-segments", *parts, list(CATEGORIES), size, things=tuple(range(len(THINGS))))


class SceneReader:
    """Number -> picture and segments. Those that have been drawn are kept while they are small."""

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
