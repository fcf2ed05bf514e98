"""Checks of the entries of a COCO json file. Each function raises ValueError with the fault in words, or returns the checked value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from vitarium.data.images import MAX_ASPECT, MAX_PIXELS

Size = tuple[int, int]


def check_id(value: Any, what: str) -> int | str:
    """Return an id: a whole number or a text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{what} must be a number or a text, it is {shown(value)}")
    return value


def check_file_name(value: Any) -> str:
    """Return a path that leads downwards from the folder of the images."""
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > 4096:
        raise ValueError(f"file_name must be a path, it is {shown(value)}")
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive or value.startswith("\\"):
        raise ValueError(f"file_name {shown(value)} is an absolute path; it must be relative to the folder of the images")
    if ".." in re.split(r"[/\\]", value):
        raise ValueError(f"file_name {shown(value)} leads out of the folder of the images (..)")
    return value


def check_size(height: Any, width: Any) -> Size:
    """Return height and width of an image, pixels."""
    sides = (whole(height, "height"), whole(width, "width"))
    if min(sides) < 1 or sides[0] * sides[1] > MAX_PIXELS or max(sides) > MAX_ASPECT * min(sides):
        raise ValueError(f"its size is {shown(sides[0])} x {shown(sides[1])} (height x width); at most {MAX_PIXELS:,} pixels are read")
    return sides


def check_box(box: Any, size: Size) -> None:
    """Check a box (x, y, width, height) in pixels: it may begin and end outside the image, by less than the image's size."""
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"its box must be [x, y, width, height], it is {shown(box)}")
    x, y, width, height = (finite(value, "its box") for value in box)
    if width < 0 or height < 0:
        raise ValueError(f"its box {box} (x, y, width, height) is inverted")
    if width == 0 or height == 0:
        raise ValueError(f"its box {box} is empty")
    if not (_near(x, size[1]) and _near(x + width, size[1]) and _near(y, size[0]) and _near(y + height, size[0])):
        raise ValueError(f"its box {shown(box)} lies outside the image of {size[0]} x {size[1]} pixels (height x width)")


def check_shape(segmentation: Any, size: Size) -> list[Any] | dict[str, Any]:
    """Return polygons [[x, y, ...], ...] or run lengths {"size", "counts"}. Compressed run lengths are checked when they are drawn."""
    if isinstance(segmentation, list):
        _check_polygons(segmentation, size)
        return segmentation
    if not isinstance(segmentation, dict):
        raise ValueError(f"its segmentation must be a list of polygons or a table of run lengths, it is {shown(segmentation)}")
    sides = segmentation.get("size")
    if not isinstance(sides, list) or tuple(sides) != size or any(isinstance(side, bool) for side in sides):
        raise ValueError(f"its run lengths are for {shown(sides)}, the image has {list(size)} (height, width)")
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        check_counts(counts, size)
    elif not isinstance(counts, str) or len(counts) > 16 * (size[0] * size[1] + 1):
        raise ValueError(f"its run lengths (counts) must be a list of numbers or a text, they are {shown(counts)}")
    return segmentation


def check_counts(counts: Sequence[Any], size: Size) -> None:
    """Check run lengths: whole numbers, none negative, which cover all pixels of the image."""
    if any(type(count) is not int or count < 0 for count in counts):
        odd = next(count for count in counts if type(count) is not int or count < 0)
        raise ValueError(f"its run lengths must be whole numbers from 0 on, one is {shown(odd)}")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"its run lengths cover {shown(sum(counts))} pixels, the image has {size[0] * size[1]}")
    if len(counts) > 2 * size[0] * size[1] + 1:
        raise ValueError(f"it has {len(counts)} run lengths, more than the image has pixels")


def read_counts(text: str, size: Size) -> list[int]:
    """Return the run lengths of COCO's compressed text: groups of five bits, and differences to the length before the last."""
    counts: list[int] = []
    value, shift, limit = 0, 0, size[0] * size[1]
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"its run lengths hold the character {character!r}, which compressed ones do not have at this place")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if not 0 <= counts[-1] <= limit:
            raise ValueError(f"its run lengths hold {counts[-1]}, the image has {limit} pixels")
        value, shift = 0, 0
    if shift:
        raise ValueError("its run lengths are cut off")
    return counts


def whole(value: Any, what: str) -> int:
    """Return a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise ValueError(f"{what} must be a whole number, it is {shown(value)}")
    return int(value)


def finite(value: Any, what: str) -> float:
    """Return a number that is neither infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} must hold numbers, one is {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} must hold finite numbers, one is {shown(value)}")
    return number


def shown(value: Any) -> str:
    """Return a short text of any value for a message."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = repr(value) if not isinstance(value, list | dict) else f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    if isinstance(value, list) and len(value) <= 4 and all(isinstance(v, int | float) and abs(v) < 10**20 for v in value):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _near(value: float, side: int) -> bool:
    return -side <= value <= 2 * side


def _check_polygons(polygons: list[Any], size: Size) -> None:
    if not polygons:
        raise ValueError("it has no polygon")
    side = 2 * max(size)
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon has fewer than three corners, or half of one")
        if not (set(map(type, polygon)) <= {int, float} and -side <= min(polygon) and max(polygon) <= side):
            odd = next(v for v in polygon if type(v) not in (int, float) or not -side <= v <= side)
            raise ValueError(
                f"a corner of a polygon is {shown(odd)}; corners must lie in or near the image of {size[0]} x {size[1]} pixels"
            )
