"""Classification of rendered images: scenes as an image set, by task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitarium.assignments import split_assignment, split_options
from vitarium.data.image_set import ImageData
from vitarium.data.scenes.actions import ACTIONS, action_label, draw_action
from vitarium.data.scenes.far_sum import CLASSES as FAR_SUM_CLASSES
from vitarium.data.scenes.far_sum import draw_far_sum, far_sum_label
from vitarium.data.scenes.fine_parts import CLASSES as FINE_PARTS_CLASSES
from vitarium.data.scenes.fine_parts import draw_fine_parts, fine_parts_label
from vitarium.data.scenes.layout import THINGS
from vitarium.data.scenes.same_shape import CLASSES, draw_same_shape, same_shape_label
from vitarium.data.scenes.scene import Scenes
from vitarium.data.scenes.size_transfer import CLASSES as SIZE_TRANSFER_CLASSES
from vitarium.data.scenes.size_transfer import draw_size_transfer, size_transfer_label
from vitarium.data.scenes.textures import CLASSES as TEXTURES_CLASSES
from vitarium.data.scenes.textures import draw_textures, textures_label
from vitarium.data.scenes.thorax import CLASSES as THORAX_CLASSES
from vitarium.data.scenes.thorax import draw_thorax, thorax_label
from vitarium.data.scenes.tissue import CLASSES as TISSUE_CLASSES
from vitarium.data.scenes.tissue import draw_tissue, tissue_label
from vitarium.data.scenes.two_scales import CLASSES as TWO_SCALES_CLASSES
from vitarium.data.scenes.two_scales import draw_two_scales, two_scales_label
from vitarium.errors import UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 64
MEMORY_BYTES = 256 * 2**20
"""Memory limit of the cache of rendered images; training accesses each many times."""


@dataclass(frozen=True)
class Task:
    """Labelled images by index.

    Args:
        classes: class names.
        label: index -> class number, without rendering.
        draw: (number, seed, image_size) -> uint8 (image_size, image_size, 3), or of a clip (frames, image_size, image_size, 3).
        length: default number of images in both parts.
        image_size: default side of the images, pixels.
        draw_held_out: draws the held-out images where they are made of other material than the training images; None: `draw` does.
    """

    classes: Sequence[str]
    label: Callable[[int], int]
    draw: Callable[[int, int, int], NDArray[np.uint8]]
    length: int = 2000
    image_size: int = IMAGE_SIZE
    draw_held_out: Callable[[int, int, int], NDArray[np.uint8]] | None = None


TASKS = {
    "class": Task(THINGS, Scenes().label, lambda index, seed, size: Scenes(size, seed)[index].image),
    "same_shape": Task(CLASSES, same_shape_label, draw_same_shape, length=10_000),  # fewer images would be memorised
    "far_sum": Task(FAR_SUM_CLASSES, far_sum_label, draw_far_sum, 10_000, 32, functools.partial(draw_far_sum, held_out=True)),
    "textures": Task(TEXTURES_CLASSES, textures_label, draw_textures, 10_000, 32),
    "two_scales": Task(TWO_SCALES_CLASSES, two_scales_label, draw_two_scales, 10_000, 32),
    "size_transfer": Task(SIZE_TRANSFER_CLASSES, size_transfer_label, draw_size_transfer, 10_000, 32),
    "fine_parts": Task(FINE_PARTS_CLASSES, fine_parts_label, draw_fine_parts, 10_000, 32),
    "tissue": Task(TISSUE_CLASSES, tissue_label, draw_tissue, 10_000, 32),
    "action": Task(ACTIONS, action_label, draw_action),
    "thorax": Task(THORAX_CLASSES, thorax_label, draw_thorax),
}


class DrawnImages:
    """The images of a task with indices in a range, rendered on first access."""

    def __init__(self, task: str, numbers: range, *, seed: int, image_size: int, held_out: bool = False):
        self.task, self.numbers, self.seed, self.image_size, self.held_out = task, numbers, seed, image_size, held_out
        self.targets = [TASKS[task].label(number) for number in numbers]
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._room = MEMORY_BYTES

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image | list[Image.Image], int]:
        from PIL import Image

        pixels = self._kept.get(index)
        if pixels is None:
            task = TASKS[self.task]
            draw = task.draw_held_out if self.held_out and task.draw_held_out else task.draw
            pixels = draw(self.numbers[index], self.seed, self.image_size)
            if pixels.nbytes <= self._room:
                self._kept[index] = pixels
                self._room -= pixels.nbytes
        drawn = Image.fromarray(pixels) if pixels.ndim == 3 else [Image.fromarray(frame) for frame in pixels]
        return drawn, self.targets[index]

    def describe(self, index: int) -> str:
        """Describe an image by task and index."""
        return f"scenes {self.task} #{self.numbers[index]}"


def open_scenes(options: str = "", *, image_size: int | None = None, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Open rendered images for classification.

    Args:
        options: "KEY=VALUE,..." of image_size (pixels; else the task's own, 64 or 32), length (images in both parts; else the task's own),
            task ("class": the kind of the nearest object; "same_shape": whether two marks far apart have the same shape; "action": clips,
            the kind of motion; "thorax": X-rays, whether there is a nodule). Others are meant for experiments, each needs a mechanism:
            "far_sum": the sum of two digits in opposite corners, modulo 4; "textures": orientation and frequency of a grating;
            "two_scales": a large letter of small shapes, and which; "size_transfer": a shape of constant size in pixels, whatever the
            image_size; "fine_parts": the direction of a short line on a body; "tissue": size and elongation of nuclei.
        image_size: used if the options do not set it.
        seed: of all random numbers.
        val_fraction: share that is held out.

    Raises:
        UsageError: an option or value that is not accepted.
    """
    values = _parse(options)
    task = values.get("task", "class")
    if task not in TASKS:
        raise UsageError(f"scenes have no task {task!r}{nearest(task, TASKS)} (accepted: {', '.join(TASKS)})")
    size = _number("image_size", values.get("image_size", image_size or TASKS[task].image_size), least=16)
    classes = list(TASKS[task].classes)
    length = _number("length", values.get("length", TASKS[task].length), least=2 * len(classes))
    if not 0 < val_fraction < 1:
        raise UsageError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    border = min(max(round(length * (1 - val_fraction)), len(classes)), length - len(classes))
    part = functools.partial(DrawnImages, task, seed=seed, image_size=size)
    name = "scenes" if task == "class" else f"scenes-{task}"
    return ImageData(name, part(range(border)), part(range(border, length), held_out=True), classes, size)


def _parse(
    options: str,
    known: Sequence[str] = ("image_size", "length", "task"),
    examples: str = "image_size=64, length=2000, task=class",
) -> dict[str, str]:
    accepted = f"accepted: {examples}"
    values = {}
    for option in split_options(options):
        key, value = split_assignment(option, f"scenes have no option {option!r} ({accepted})")
        if key not in known or not value:
            raise UsageError(f"scenes have no option {option!r}{nearest(key, known) if key not in known else ''} ({accepted})")
        if key in values:
            raise UsageError(f"the options {options!r} of scenes set {key} twice; leave one out")
        values[key] = value
    return values


def _number(name: str, value: str | int, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < least:
        raise UsageError(f"{name} of scenes must be a whole number of at least {least}, got {value!r}")
    return number
