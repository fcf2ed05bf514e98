"""Reading of COCO json: panoptic (with PNGs whose colours encode segment numbers) and instances (with polygons and run lengths)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data.bad_files import BrokenImage
from vitarium.data.image_set import Samples
from vitarium.data.images import open_image
from vitarium.data.joint import Segmentation
from vitarium.data.parts import few, part_names
from vitarium.data.segmented import Kind, SegmentedData, split_samples
from vitarium.errors import DataError, require

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 10


@dataclass
class Sample:
    """An image with its segments from the json file.

    Args:
        file: path of the image.
        png: path of its segment map, for panoptic data; else "".
        size: (height, width) in the json file.
        segments: {"label", "crowd"} and "id" (panoptic) or "segmentation" (instances).
    """

    file: str
    png: str
    size: tuple[int, int]
    segments: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Annotations:
    """A checked json file."""

    classes: list[str]
    things: tuple[int, ...]
    samples: list[Sample]


def find_annotations(path: Path) -> list[Path]:
    """List the json files of a folder in COCO's layout; [] if it has another layout."""
    if not path.is_dir():
        return []
    places = [path / "annotations", path]
    names = ("panoptic_*.json", "instances_*.json", "panoptic.json", "instances.json")
    return [file for place in places if place.is_dir() for name in names for file in sorted(place.glob(name))]


def open_coco(path: Path, kind: Kind, *, broken: str = "refuse", seed: int = 0, val_fraction: float = 0.2) -> SegmentedData:
    """Open a json file, or a folder with annotations/panoptic_*.json or annotations/instances_*.json (of train and val, or of one part).

    Panoptic files are preferred unless instances are requested. Images are looked up in folders named as the json's part, beside it or
    beside its folder: `val2017/` for `panoptic_val2017.json`, also below `images/`.

    Args:
        broken: "refuse" a file with invalid entries, or "drop" these.

    Raises:
        DataError: not a COCO json file, or one with invalid entries; the message lists the first ten.
    """
    files = [path] if path.is_file() else find_annotations(path)
    if not files:
        raise DataError(f"{path} holds no annotations/panoptic_*.json and no annotations/instances_*.json")
    order = ("instances", "panoptic") if kind == "instance" else ("panoptic", "instances")
    prefix = next(p for p in (*order, "") if any(file.name.startswith(p) for file in files))
    files = [file for file in files if file.name.startswith(prefix)]
    by_part = {_part(file): file for file in files}
    train_name, val_name = part_names(name for name in by_part if name)
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if train_name is None and len(files) > 1:
        raise DataError(f"{path} holds {few([file.name for file in files])}; name the file to use, or call the parts train and val")
    train = read_annotations(by_part[train_name] if train_name else files[0], broken)
    if train_name and val_name:
        val = read_annotations(by_part[val_name], broken)
        if (val.classes, val.things) != (train.classes, train.things):
            odd = sorted(set(val.classes) ^ set(train.classes))
            raise DataError(f"{path}: the categories of train and val differ{f': {few(odd)}' if odd else ' in their order'}")
        parts = train.samples, val.samples
    else:
        parts = split_samples(train.samples, val_fraction, seed, name)
    images = [Samples(part, read=read_sample, name=_file_of) for part in parts]
    if not all(map(len, images)):
        raise DataError(f"{name} holds {len(images[0])} images for training and {len(images[1])} held out; both must not be empty")
    return SegmentedData(name, images[0], images[1], train.classes, things=train.things)


def _file_of(sample: Sample) -> str:
    return sample.file


def _part(file: Path) -> str:
    """Return "train" for panoptic_train2017.json; "" if the name contains no part."""
    words = file.stem.lower().replace("-", "_").split("_")
    return next((part for word in words for part in ("train", "val", "test") if word.startswith(part)), "")


def read_annotations(path: Path, broken: str = "refuse") -> Annotations:
    """Read a json file's categories and images. No image is opened.

    Raises:
        DataError: not a COCO json file; or, with `broken` "refuse", invalid entries: missing images, annotations of unknown images or
            categories, empty and inverted boxes, segments of another size than the image's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        images, notes, categories = values["images"], values["annotations"], sorted(values["categories"], key=lambda c: c["id"])
        numbers = {category["id"]: number for number, category in enumerate(categories)}
        classes = [str(category["name"]) for category in categories]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not COCO's json (a table with images, annotations and categories): {what}") from error
    if not classes:
        raise DataError(f"{path} has no categories")
    if twice := [name for name, count in Counter([*(c["id"] for c in categories), *classes]).items() if count > 1]:
        raise DataError(f"{path}: categories are listed twice: {few(twice)}")
    panoptic = any("segments_info" in note for note in notes[:1])
    things = tuple(number for number, category in enumerate(categories) if category.get("isthing", 1))
    checked = _Checked(path, panoptic, numbers)
    samples = checked.samples(images, notes)
    if checked.problems and broken == "refuse":
        listed = "\n".join(f"  {problem}" for problem in checked.problems[:SHOWN])
        more = f"\n  and {len(checked.problems) - SHOWN} more" if len(checked.problems) > SHOWN else ""
        raise DataError(
            f"{path} is wrong in {len(checked.problems)} places:\n{listed}{more}\nrepair it, or leave these out with coco:PATH,broken=drop"
        )
    return Annotations(classes, things, samples)


class _Checked:
    """Check of one json file, which collects valid entries and problems."""

    def __init__(self, path: Path, panoptic: bool, numbers: dict[Any, int]):
        self.path, self.panoptic, self.numbers = path, panoptic, numbers
        self.pngs = _png_folder(path)
        self.problems: list[str] = []

    def samples(self, images: list[dict[str, Any]], notes: list[dict[str, Any]]) -> list[Sample]:
        root = _picture_folder(self.path, images)
        by_id: dict[Any, Sample] = {}
        for i, image in enumerate(images):
            try:
                file = root / image["file_name"]
                sample = Sample(str(file), "", (int(image["height"]), int(image["width"])))
                if image["id"] in by_id:
                    self.problems.append(f"image {image['id']!r} is listed twice")
                elif not file.is_file():
                    self.problems.append(f"image {image['id']!r}: there is no file {file}")
                else:
                    by_id[image["id"]] = sample
            except (TypeError, ValueError, LookupError) as error:
                self.problems.append(f"images[{i}] lacks file_name, id, height or width ({type(error).__name__}: {error})")
        known = {image.get("id") for image in images if isinstance(image, dict)}
        for i, note in enumerate(notes):
            try:
                self._annotation(note, i, by_id, known)
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                self.problems.append(f"annotations[{i}] is incomplete ({type(error).__name__}: {error})")
        return [sample for sample in by_id.values() if sample.segments]

    def _annotation(self, note: dict[str, Any], place: int, by_id: dict[Any, Sample], known: set[Any]) -> None:
        name = f"annotation {note.get('id', place)!r}" if not self.panoptic else f"annotation of image {note['image_id']!r}"
        if note["image_id"] not in known:
            self.problems.append(f"{name}: there is no image {note['image_id']!r}")
            return
        sample = by_id.get(note["image_id"])
        if sample is None:  # its image is missing and already reported
            return
        if not self.panoptic:
            self._segment(note, name, sample, {"segmentation": note["segmentation"]})
            return
        png = self.pngs / note["file_name"]
        if not png.is_file():
            self.problems.append(f"{name}: there is no file {png}")
            return
        sample.png = str(png)
        for segment in note["segments_info"]:
            self._segment(segment, f"segment {segment['id']!r} of image {note['image_id']!r}", sample, {"id": int(segment["id"])})

    def _segment(self, note: dict[str, Any], name: str, sample: Sample, rest: dict[str, Any]) -> None:
        if note["category_id"] not in self.numbers:
            self.problems.append(f"{name}: there is no category {note['category_id']!r}")
            return
        problem = _box_problem(note.get("bbox")) or (None if self.panoptic else _shape_problem(note["segmentation"], sample.size))
        if problem:
            self.problems.append(f"{name}: {problem}")
            return
        sample.segments.append({"label": self.numbers[note["category_id"]], "crowd": bool(note.get("iscrowd", 0)), **rest})


def _box_problem(box: Any) -> str | None:
    if box is None:
        return None
    _, _, width, height = (float(value) for value in box)
    if width < 0 or height < 0:
        return f"its box {box} (x, y, width, height) is inverted"
    return f"its box {box} is empty" if width == 0 or height == 0 else None


def _shape_problem(segmentation: Any, size: tuple[int, int]) -> str | None:
    if isinstance(segmentation, list):
        if not segmentation:
            return "it has no polygon"
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
            return "a polygon has fewer than three corners, or half of one"
        return None
    if tuple(segmentation["size"]) != size:
        return f"its run lengths are for {list(segmentation['size'])}, the image has {list(size)} (height, width)"
    counts = segmentation["counts"]
    if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
        return f"its run lengths cover {sum(counts)} pixels, the image has {size[0] * size[1]}"
    return None


def _picture_folder(path: Path, images: list[dict[str, Any]]) -> Path:
    """Return the folder to which `file_name` is relative: the first in which an image is found."""
    part = path.stem.split("_", 1)[-1]
    above = path.parent.parent
    places = [above / part, above / "images" / part, above / _part(path), above / "images" / _part(path), above / "images", above]
    places += [path.parent / part, path.parent / "images", path.parent]
    names = [str(image["file_name"]) for image in images[:20] if isinstance(image, dict) and image.get("file_name")]
    return next((place for place in places for name in names if (place / name).is_file()), places[0])


def _png_folder(path: Path) -> Path:
    beside = path.with_suffix("")
    return beside if beside.is_dir() else path.parent.parent / path.stem


def read_sample(sample: Sample) -> tuple[Image.Image, Segmentation]:
    """Open an image and draw its segments.

    Raises:
        BrokenImage: the image or its PNG cannot be read, or has another size than in the json file.
    """
    image = open_image(sample.file)
    if (image.height, image.width) != sample.size:
        found = f"{image.height} x {image.width}"
        raise BrokenImage(
            sample.file, f"the image has {found} pixels (height x width), the json file says {sample.size[0]} x {sample.size[1]}"
        )
    labels = np.array([segment["label"] for segment in sample.segments], np.int64)
    crowd = np.array([segment["crowd"] for segment in sample.segments], bool)
    masks = _masks_of_png(sample) if sample.png else np.array(list(_masks_of_shapes(sample)), bool)
    return image, Segmentation(masks, labels, crowd)


def _masks_of_png(sample: Sample) -> NDArray[np.bool_]:
    colours = np.asarray(open_image(sample.png).convert("RGB"), dtype=np.int64)
    if colours.shape[:2] != sample.size:
        found = f"{colours.shape[0]} x {colours.shape[1]}"
        raise BrokenImage(
            sample.png, f"the segments have {found} pixels (height x width), the json file says {sample.size[0]} x {sample.size[1]}"
        )
    numbers = colours @ np.array([1, 256, 65536])
    return numbers == np.array([segment["id"] for segment in sample.segments])[:, None, None]


def _masks_of_shapes(sample: Sample) -> Iterator[NDArray[np.bool_]]:
    rle: Any = require("pycocotools.mask", "dense")
    height, width = sample.size
    for segment in sample.segments:
        shape = segment["segmentation"]
        try:
            if isinstance(shape, list):
                shape = rle.merge(rle.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                shape = rle.frPyObjects(shape, height, width)
            yield rle.decode(shape).astype(bool)
        except (TypeError, ValueError) as error:
            raise BrokenImage(sample.file, f"a segment of it cannot be drawn: {error}") from error


def encode_panoptic(segment_map: NDArray[np.integer[Any]]) -> Image.Image:
    """Encode a segment map (H, W) as an image in COCO's colours: R + 256 G + 65536 B."""
    from PIL import Image

    numbers = segment_map.astype(np.int64)
    return Image.fromarray(np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8))
