"""Reading of COCO json: panoptic (with PNGs whose colours encode segment numbers) and instances (with polygons and run lengths)."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data.bad_files import BrokenImage
from vitarium.data.coco_checks import check_box, check_counts, check_file_name, check_id, check_shape, check_size, read_counts, shown, whole
from vitarium.data.image_set import Samples
from vitarium.data.images import open_image
from vitarium.data.joint import Segmentation
from vitarium.data.parts import few, part_in
from vitarium.data.segmented import Kind, SegmentedData, divide_samples
from vitarium.errors import DataError, require
from vitarium.texts import indented

if TYPE_CHECKING:
    from PIL import Image


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

    @property
    def files(self) -> tuple[str, str]:
        """Paths of the image and of its segment map, which is "" for instances."""
        return self.file, self.png


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


def open_coco(
    path: Path, kind: Kind, *, broken: str = "refuse", seed: int = 0, val_fraction: float = 0.2, split: str | None = None
) -> SegmentedData:
    """Open a json file, or a folder with annotations/panoptic_*.json or annotations/instances_*.json (of train and val, or of one part).

    Panoptic files are preferred unless instances are requested. Images are looked up in folders named as the json's part, beside it or
    beside its folder: `val2017/` for `panoptic_val2017.json`, also below `images/`. Images without annotations stay in the held-out part,
    where whatever a model finds in them is wrong; training leaves them out. The notes count them.

    Args:
        broken: "refuse" a file with invalid entries, or "drop" these.
        seed, val_fraction: of the held-out part, if there is none.
        split: for an evaluation, the part that it measures: see `divide`.

    Raises:
        DataError: not a COCO json file, or one with invalid entries; the message lists the first ten.
    """
    files = _chosen_files(path, kind)
    read = {part: read_annotations(file, broken) for part, file in files.items()}
    first, name = next(iter(read.values())), path.resolve().stem if path.is_file() else path.resolve().name
    for part, other in read.items():
        if (other.classes, other.things) != (first.classes, first.things):
            odd, one = sorted(set(other.classes) ^ set(first.classes)), next(iter(read))
            raise DataError(f"{path}: the categories of {one} and {part} differ{f': {few(odd)}' if odd else ' in their order'}")
    found = divide_samples(name, {part: one.samples for part, one in read.items()}, seed=seed, val_fraction=val_fraction, split=split)
    kept = [sample for sample in found.train if sample.segments]
    empty = (len(found.train) - len(kept), sum(not sample.segments for sample in found.val))
    notes = list(found.notes)
    if any(empty):
        where = (
            f"{empty[0]} of {len(found.train)} for training, which are left out, {empty[1]} of {len(found.val)} held out, which are kept"
        )
        notes.append(f"{path}: images without annotations: {where}")
    if split is None and not kept:
        raise DataError(f"{name} holds no images with annotations for training")
    train, val = (Samples(part, read=read_sample, name=_file_of) for part in (kept, found.val))
    return SegmentedData(name, train, val, first.classes, notes=tuple(notes), part=found.part, drawn=found.drawn, things=first.things)


def _chosen_files(path: Path, kind: Kind) -> dict[str, Path]:
    """Return part -> json file; "" for a single file.

    Raises:
        DataError: none, or several of a part.
    """
    files = [path] if path.is_file() else find_annotations(path)
    if not files:
        raise DataError(f"{path} holds no annotations/panoptic_*.json and no annotations/instances_*.json")
    order = ("instances", "panoptic") if kind == "instance" else ("panoptic", "instances")
    prefix = next(p for p in (*order, "") if any(file.name.startswith(p) for file in files))
    files = [file for file in files if file.name.startswith(prefix)]
    if len(files) == 1:
        return {"": files[0]}
    by_part = {part: [file for file in files if _part(file) == part] for part in ("train", "val", "test", "")}
    several = any(len(of_part) > 1 for of_part in by_part.values())
    if not by_part["train"] or by_part[""] or several:
        raise DataError(f"{path} holds {few([file.name for file in files])}; name the file to use, or call the parts train and val")
    return {part: of_part[0] for part, of_part in by_part.items() if of_part}


def _file_of(sample: Sample) -> str:
    return sample.file


def _part(file: Path) -> str:
    """Return "train" for panoptic_train2017.json; "" if the name contains no part."""
    return part_in(file.stem) or ""


def read_annotations(path: Path, broken: str = "refuse") -> Annotations:
    """Read a json file's categories and images. No image is opened.

    Raises:
        DataError: not a COCO json file; or, with `broken` "refuse", invalid entries: missing images, images outside of their folder,
            annotations of unknown images or categories, empty, inverted and far boxes, segments of another size than the image's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        tables = [_entries(values, name) for name in ("images", "annotations", "categories")]
        images, notes, categories = tables
        ids = [check_id(category["id"], "the id of a category") for category in categories]
        classes = [str(check_id(category["name"], "the name of a category")) for category in categories]
        things = [bool(whole(category.get("isthing", 1), "isthing")) for category in categories]
        order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not COCO's json (a table with images, annotations and categories): {what}") from error
    if not classes:
        raise DataError(f"{path} has no categories")
    if twice := [name for name, count in [*Counter(ids).items(), *Counter(classes).items()] if count > 1]:
        raise DataError(f"{path}: categories are listed twice: {few(twice)}")
    panoptic = any(isinstance(note, dict) and "segments_info" in note for note in notes[:1])
    checked = _Checked(path, panoptic, {ids[i]: number for number, i in enumerate(order)})
    samples = checked.samples(images, notes)
    if checked.problems and broken == "refuse":
        raise DataError(
            f"{path} is wrong in {len(checked.problems)} places:\n{indented(checked.problems)}\n"
            "repair it, or leave these out with coco:PATH,broken=drop"
        )
    return Annotations([classes[i] for i in order], tuple(number for number, i in enumerate(order) if things[i]), samples)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"it holds {text}, which JSON does not have")


def _entries(values: Any, name: str) -> list[Any]:
    entries = values[name]
    if not isinstance(entries, list):
        raise ValueError(f"{name} must be a list, it is {shown(entries)}")
    return entries


class _Checked:
    """Check of one json file, which collects valid entries and problems."""

    def __init__(self, path: Path, panoptic: bool, numbers: dict[int | str, int]):
        self.path, self.panoptic, self.numbers = path, panoptic, numbers
        self.pngs = _png_folder(path)
        self.problems: list[str] = []
        self.spoiled: set[str] = set()

    def samples(self, images: list[Any], notes: list[Any]) -> list[Sample]:
        """Return the images with their valid segments; images all of whose segments are invalid are left out."""
        root = _image_folder(self.path, images)
        by_id: dict[int | str, Sample] = {}
        known: set[int | str] = set()
        for i, image in enumerate(images):
            try:
                self._image(image, root, by_id, known)
            except (TypeError, LookupError, OverflowError) as error:
                self.problems.append(f"images[{i}] lacks file_name, id, height or width ({type(error).__name__}: {error})")
            except (ValueError, OSError) as error:
                self.problems.append(f"images[{i}]: {error}")
        for i, note in enumerate(notes):
            try:
                self._annotation(note, i, by_id, known)
            except (TypeError, LookupError, AttributeError, OverflowError, OSError) as error:
                self.problems.append(f"annotations[{i}] is incomplete ({type(error).__name__}: {error})")
            except ValueError as error:
                self.problems.append(f"annotations[{i}]: {error}")
        return [sample for sample in by_id.values() if sample.segments or sample.file not in self.spoiled]

    def _image(self, image: Any, root: Path, by_id: dict[int | str, Sample], known: set[int | str]) -> None:
        file = root / check_file_name(image["file_name"])
        number = check_id(image["id"], "its id")
        twice = number in known
        known.add(number)
        size = check_size(image["height"], image["width"])
        if twice:
            self.problems.append(f"image {shown(number)} is listed twice")
        elif not file.is_file():
            self.problems.append(f"image {shown(number)}: there is no file {file}")
        else:
            by_id[number] = Sample(str(file), "", size)

    def _annotation(self, note: dict[str, Any], place: int, by_id: dict[int | str, Sample], known: set[int | str]) -> None:
        owner = check_id(note["image_id"], "image_id")
        name = f"annotation {shown(note.get('id', place))}" if not self.panoptic else f"annotation of image {shown(owner)}"
        if owner not in known:
            self.problems.append(f"{name}: there is no image {shown(owner)}")
            return
        sample = by_id.get(owner)
        if sample is None:  # its image is missing and already reported
            return
        before = len(self.problems)
        try:
            if self.panoptic:
                self._map(note, name, sample)
            else:
                self._segment(note, name, sample, {"segmentation": note["segmentation"]})
        except Exception:
            self.spoiled.add(sample.file)
            raise  # to be listed with the problems
        if len(self.problems) > before:
            self.spoiled.add(sample.file)

    def _map(self, note: dict[str, Any], name: str, sample: Sample) -> None:
        """Check the segments of a panoptic annotation."""
        png = self.pngs / check_file_name(note["file_name"])
        if not png.is_file():
            self.problems.append(f"{name}: there is no file {png}")
            return
        if not isinstance(note["segments_info"], list):
            raise ValueError(f"segments_info must be a list, it is {shown(note['segments_info'])}")
        sample.png = str(png)
        for segment in note["segments_info"]:
            number = whole(segment["id"], "the id of a segment")
            if not 0 <= number < 1 << 24:
                raise ValueError(f"the id of a segment must be a colour, from 0 to {(1 << 24) - 1}; it is {shown(number)}")
            self._segment(segment, f"segment {number} of {name.removeprefix('annotation of ')}", sample, {"id": number})

    def _segment(self, note: dict[str, Any], name: str, sample: Sample, rest: dict[str, Any]) -> None:
        category = check_id(note["category_id"], "category_id")
        if category not in self.numbers:
            self.problems.append(f"{name}: there is no category {shown(category)}")
            return
        if (crowd := note.get("iscrowd", 0)) not in (0, 1):
            raise ValueError(f"iscrowd must be 0 or 1, it is {shown(crowd)}")
        try:
            if note.get("bbox") is not None:
                check_box(note["bbox"], sample.size)
            if not self.panoptic:
                check_shape(note["segmentation"], sample.size)
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
            return
        sample.segments.append({"label": self.numbers[category], "crowd": bool(crowd), **rest})


def _image_folder(path: Path, images: list[Any]) -> Path:
    """Return the folder to which `file_name` is relative: the first in which an image is found."""
    part = path.stem.split("_", 1)[-1]
    above = path.parent.parent
    places = [above / part, above / "images" / part, above / _part(path), above / "images" / _part(path), above / "images", above]
    places += [path.parent / part, path.parent / "images", path.parent]
    names = []
    for image in images[:20]:
        with contextlib.suppress(TypeError, LookupError, ValueError):  # reported with the images
            names.append(check_file_name(image["file_name"]))
    return next((place for place in places for name in names if _is_file(place / name)), places[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


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
    masks = _masks_of_png(sample) if sample.png else np.array(list(_masks_of_shapes(sample)), bool).reshape(-1, *sample.size)
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
                drawn = rle.decode(rle.merge(rle.frPyObjects([[float(v) for v in polygon] for polygon in shape], height, width)))
            else:
                counts = shape["counts"] if isinstance(shape["counts"], list) else read_counts(shape["counts"], sample.size)
                check_counts(counts, sample.size)
                drawn = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
            yield drawn.astype(bool)
        except (TypeError, ValueError) as error:
            raise BrokenImage(sample.file, f"a segment of it cannot be drawn: {error}") from error


def encode_panoptic(segment_map: NDArray[np.integer[Any]]) -> Image.Image:
    """Encode a segment map (H, W) as an image in COCO's colours: R + 256 G + 65536 B."""
    from PIL import Image

    numbers = segment_map.astype(np.int64)
    return Image.fromarray(np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8))
