"""Progress of a training where stderr is not a terminal: a line per evaluation, and every 30 seconds between them."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from vitarium.cli.console import clock, err

if TYPE_CHECKING:
    from vitarium.training import Progress
    from vitarium.training.tasks import Task

LINE_SECONDS = 30.0


class Lines:
    """Lines of a run in a log file.

    Args:
        name: of the model.
    """

    def __init__(self, name: str):
        self.name = name
        self.printed = -math.inf  # time of the last line
        self.metrics: dict[str, float] | None = None  # of the last line
        self.rate = 0.0  # images per second, of the last step that reported it

    def __call__(self, at: Progress, task: Task) -> None:
        """Print a line if an evaluation is new, or the last line is old."""
        self.rate = at.images_per_second or self.rate
        if at.step == at.total_steps:
            return  # the last line follows, with the metrics of the final weights
        new = self.metrics != at.metrics
        if new or time.monotonic() - self.printed >= LINE_SECONDS:
            self.print(at, task, "starting" if self.metrics is None else "training")

    def finish(self, at: Progress, task: Task) -> None:
        """Print the last line, with the metrics of the weights that are kept."""
        self.print(at, task, "done")

    def print(self, at: Progress, task: Task, word: str) -> None:
        """Print a line."""
        self.printed, self.metrics = time.monotonic(), at.metrics
        left = at.seconds / at.step * (at.total_steps - at.step) if at.step and word == "training" else 0.0
        metric = task.primary
        parts = [
            f"{self.name}: {word}",
            f"step {at.step:,}/{at.total_steps:,}" if at.step else "",
            f"loss {at.loss:.3f}" if at.step and math.isfinite(at.loss) else "",
            f"{metric.label} {metric.short(at.metrics[metric.name])}" if metric.name in at.metrics else "",
            f"{self.rate:,.0f} images/s" if self.rate and word == "training" else "",
            f"{clock(left)} left" if left else f"in {clock(at.seconds)}" if word == "done" else "",
        ]
        err().print(", ".join(filter(None, parts)), markup=False, soft_wrap=True)
