"""Answers of the model for uploaded images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitarium.data.image_set import Samples
from vitarium.data.images import decode_image
from vitarium.training.answering import answers_of, shown
from vitarium.training.tasks.base import Task

if TYPE_CHECKING:
    from torch import nn

    from vitarium.serving.worker import Job


@dataclass(frozen=True)
class Answer:
    """The answer for one image.

    Attributes:
        values: as a row of `vitarium predict` without "image"; {"error": reason} for an unreadable one.
        drawing: as PNG, if it was asked for and the task draws answers; else None.
    """

    values: dict[str, Any]
    drawing: bytes | None = None

    @property
    def error(self) -> str | None:
        """Reason why there is no answer."""
        return self.values.get("error")


def answer_jobs(task: Task, model: nn.Module, jobs: Sequence[Job]) -> list[Answer]:
    """Answer jobs of one `top_k` in one forward pass, in order."""
    images = Samples(range(len(jobs)), [0] * len(jobs), read=lambda number: decode_image(jobs[number].content, str(number)))
    found = [Answer({})] * len(jobs)
    for number, answer in answers_of(task, model, images, limit=jobs[0].top_k, batch_size=len(jobs)):
        drawn = task.draw(images[number][0], answer) if jobs[number].draw and "error" not in answer else None
        found[number] = Answer(shown(answer), None if drawn is None else as_png(drawn))
    return found


def as_png(image: Any) -> bytes:
    """Return a PIL image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def warm_up_image(side: int) -> bytes:
    """Return a grey PNG of side x side pixels."""
    from PIL import Image

    return as_png(Image.new("RGB", (side, side), (127, 127, 127)))
