"""How the command line speaks: tables and messages on a terminal, plain JSON for machines."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 160  # columns; a pipe has no width of its own, and a table cut at 80 loses what one greps for


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(stderr=stderr, width=wide, highlight=False)


def out() -> Console:
    """Where results go."""
    return _console(stderr=False)


def err() -> Console:
    """Where progress, notes and errors go, so that a pipe carries results only."""
    return _console(stderr=True)


def print_json(value: Any) -> None:
    """JSON on stdout, never wrapped or coloured."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table. A column whose name begins with ">" is set to the right, as numbers want it; one with "~" folds first where the
    terminal is narrow."""
    style = dict(title_justify="left", title_style="bold", header_style="cyan", pad_edge=False, show_edge=False, collapse_padding=True)
    result = Table(box=box.SIMPLE_HEAD, title=title and f"\n{title}", **style)  # type: ignore[arg-type]
    for name in columns:
        result.add_column(
            name.lstrip(">~"), justify="right" if name[:1] == ">" else "left", overflow="fold", no_wrap=not name.startswith("~")
        )
    return result


def pairs(rows: dict[str, Any], title: str | None = None) -> Table:
    """Names on the left, values on the right."""
    style = dict(title_justify="left", title_style="bold", pad_edge=False)
    result = Table(box=None, show_header=False, title=title and f"\n{title}", **style)  # type: ignore[arg-type]
    result.add_column(style="cyan", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows.items():
        result.add_row(name, value if hasattr(value, "__rich_console__") else str(value))
    return result


def short(value: float | None) -> str:
    """Three significant digits and a suffix: 28288354 -> "28.3 M"; "-" for what is not known."""
    if value is None:
        return "-"
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{suffix}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """75 -> "1:15"; 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
