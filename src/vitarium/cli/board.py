"""Live progress: a line a model, with its bar, loss and score; in a log file, a line for each change of state or score."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitarium.cli.console import clock, err, table

if TYPE_CHECKING:
    from vitarium.reports.events import Event

BAR_WIDTH = 20  # characters
LINE_SECONDS = 30.0
"""Seconds after which a line is written to a log although neither state nor score has changed."""
WORDS = {
    "started": "[cyan]starting[/]",
    "step": "[cyan]training[/]",
    "measuring": "[cyan]measuring[/]",
    "finished": "[green]done[/]",
    "kept": "[green]done before[/]",
    "retried": "[yellow]failed, to be retried[/]",
    "failed": "[red]failed[/]",
}


class Board:
    """Live table of events. A context manager: the table is live inside, and its last state stays on the screen.

    Args:
        models: names of all that will be trained, so that the waiting ones are shown too.
    """

    def __init__(self, models: list[str]):
        self.latest: dict[str, Event | None] = dict.fromkeys(models)
        self.printed: dict[str, float] = {}  # times of the last lines of a log
        self.console = err()
        self.live = Live(self, console=self.console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.live.stop()

    def __call__(self, event: Event) -> None:
        """Record an event."""
        before = self.latest.get(event.model)
        self.latest[event.model] = event
        if self.console.is_terminal:
            return
        new = before is None or (before.kind, score_of(before)) != (event.kind, score_of(event))
        if new or time.monotonic() - self.printed.get(event.model, 0.0) > LINE_SECONDS:
            self.printed[event.model] = time.monotonic()
            self.console.print(line(event), markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a sentence above the table, or into the log; progress, which does not end with a line break, is not shown."""
        if text.endswith("\n"):
            self.console.print(text.rstrip("\n"), markup=False, style="dim", soft_wrap=not self.console.is_terminal)

    def finish(self, model: str) -> None:
        """Mark a model as finished whose training reports no end."""
        if event := self.latest[model]:
            self(replace(event, kind="finished"))

    def __rich__(self) -> Table:
        rows = table("~model", "", "state", ">step", ">loss", ">held out", ">left")
        for model, event in self.latest.items():
            if event is None:
                rows.add_row(f"[dim]{escape(model)}", "", "[dim]waiting[/]")
                continue
            done = 1.0 if event.kind in ("measuring", "finished", "kept") else event.fraction
            bar = ProgressBar(total=1.0, completed=done, width=BAR_WIDTH, complete_style="cyan", finished_style="green")
            rows.add_row(escape(model), bar, WORDS[event.kind], *numbers(event))
        return rows


def numbers(event: Event) -> list[str]:
    """Return step, loss, score and time left as text, "" where unknown."""
    step = f"{event.step}/{event.steps}" if event.steps else str(event.step or "")
    loss = "" if event.loss is None or math.isnan(event.loss) else f"{event.loss:.3f}"
    left = clock(event.seconds_left) if event.kind == "step" and event.seconds_left is not None else ""
    return [step, loss, score_of(event), left]


def score_of(event: Event) -> str:
    """Return the primary metric of the last evaluation as text."""
    return event.score if event.accuracy is None else f"accuracy {100 * event.accuracy:.1f} %"


def line(event: Event) -> str:
    """Return an event as a line of a log."""
    word = Text.from_markup(WORDS[event.kind]).plain
    place = f"[{event.position + 1}/{event.count}] {event.model}: {word}"
    known = [f"step {event.step}" if event.step else "", score_of(event)]
    return ", ".join(filter(None, [place, *known, event.message]))
