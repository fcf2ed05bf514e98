"""Scenes: an unlimited set of labelled images, each a pure function of its index."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.language import caption, question_and_answer
from vitarium.data.scenes.layout import CATEGORIES, STUFF, THINGS, Layout, Thing, lay_out
from vitarium.data.scenes.render import draw
from vitarium.errors import UsageError


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with every label. H = W = the scenes' image_size; the N visible objects are ordered from the nearest.

    Args:
        image: uint8 (H, W, 3).
        depth: float32 (H, W), metres from the camera; the sky's is 100.
        categories: uint8 (H, W), the semantic map: indices into CATEGORIES.
        instances: int32 (H, W): i + 1 where things[i] is visible, 0 elsewhere.
        things: the visible objects, with kind, colour, texture, position and size.
        layout: the scene's content, hidden objects included.
        question, answer: about the image.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    categories: NDArray[np.uint8]
    instances: NDArray[np.int32]
    things: tuple[Thing, ...]
    layout: Layout
    question: str
    answer: str

    @property
    def label(self) -> int:
        """Class of the image: the kind of its nearest object, which is never occluded. Index into THINGS."""
        return self.things[0].category

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """Kinds of the objects, (N,), indices into THINGS."""
        return np.array([thing.category for thing in self.things], np.int64)

    @functools.cached_property
    def multi_label(self) -> NDArray[np.float32]:
        """Presence of each kind, (len(THINGS),): 1 if it is visible, else 0."""
        present = np.zeros(len(THINGS), np.float32)
        present[self.labels] = 1
        return present

    @functools.cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Visible part of each object, (N, H, W); masks do not overlap."""
        return self.instances == np.arange(1, len(self.things) + 1, dtype=np.int32)[:, None, None]

    @functools.cached_property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes x1, y1, x2, y2 around the masks, (N, 4), pixels; x2 and y2 are one past the last pixel."""
        boxes = []
        for mask in self.masks:
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        return np.array(boxes, np.float32)

    @functools.cached_property
    def panoptic(self) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
        """Return the segment map (H, W) and, for each segment, id, category_id, isthing, area (pixels). Every pixel has a segment."""
        segments = self.instances.copy()
        kinds = [int(label) for label in self.labels]
        for category in range(len(THINGS), len(CATEGORIES)):
            part = (self.categories == category) & (self.instances == 0)
            if part.any():
                kinds.append(category)
                segments[part] = len(kinds)
        areas = np.bincount(segments.ravel(), minlength=len(kinds) + 1)[1:]
        numbered = enumerate(zip(kinds, areas.tolist(), strict=True), start=1)
        return segments, [dict(id=i, category_id=kind, isthing=kind < len(THINGS), area=area) for i, (kind, area) in numbered]

    @property
    def caption(self) -> str:
        """Sentence that describes the scene, from the front to the back."""
        return caption(self.layout, self.things)


class Scenes:
    """Rendered scenes by index. `Scenes(seed=1)[7]` is the same image on every machine and at any time.

    Scenes of one seed and index have the same content at every image_size.

    Args:
        image_size: side of the images, pixels.
        seed: of all random numbers.
        length: number of scenes; None: unlimited.

    Raises:
        UsageError: a size below 16 pixels, or a negative seed or length.
    """

    categories = CATEGORIES
    things = THINGS
    stuff = STUFF

    def __init__(self, image_size: int = 64, seed: int = 0, length: int | None = None):
        if image_size < 16:
            raise UsageError(f"scenes need an image_size of 16 pixels or more, got {image_size}")
        if seed < 0 or (length is not None and length < 0):
            raise UsageError(f"seed and length of scenes must not be negative, got seed={seed}, length={length}")
        self.image_size, self.seed, self.length = image_size, seed, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("these scenes are unlimited and have no length; create them with a length")
        return self.length

    def label(self, index: int) -> int:
        """Return the class of a scene without rendering it: kinds alternate, so that classes are equally frequent."""
        return index % len(THINGS)

    def __getitem__(self, index: int) -> Scene:
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(f"scene {index} is out of range; numbers go from 0 to {'any' if self.length is None else self.length - 1}")
        rng = np.random.default_rng((self.seed, index))
        layout = lay_out(rng, THINGS[self.label(index)])
        drawn = draw(layout, rng, self.image_size)
        question, answer = question_and_answer(layout, drawn.things, rng)
        return Scene(drawn.image, drawn.depth, drawn.categories, drawn.instances, drawn.things, layout, question, answer)
