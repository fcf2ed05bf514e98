"""Output of the commands: tables and messages on a terminal, or JSON.

File names, labels and messages of others reach the terminal only through these consoles, which show control characters as escapes. In
markup they are escaped by `rich.markup.escape` in addition.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vitarium.numbers import clock as clock
from vitarium.numbers import short as short
from vitarium.texts import HARMFUL, printable

if TYPE_CHECKING:
    from vitarium.training.tasks import TableData

PIPED_WIDTH = 160  # columns; a pipe has no width, and tables of 80 columns would lose text


class SafeConsole(Console):
    """Console that shows control characters in the texts that it is given as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text as rich's `Text`, for which tables, too, call this method."""
        return super().render_str(printable(text), **options)


class _LogLines(logging.Handler):
    """Prints the library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        err().print(record.getMessage(), markup=False, soft_wrap=True)


class Output:
    """Standard output that remembers whether writing failed: the error itself does not name its file.

    Args:
        stream: the process's.

    Attributes:
        failed: whether writing failed.
    """

    def __init__(self, stream: Any):
        self._stream, self.failed = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; raises OSError as the stream does."""
        with self._watched():
            count = self._stream.write(text)
        return int(count)

    def flush(self) -> None:
        """Write what is buffered; raises OSError as the stream does."""
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.failed = True
            raise

    def drop(self) -> None:
        """Send what is left to nowhere: Python would write it at the end of the process, and replace the command's exit code."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)


def output_failed() -> bool:
    """Return whether standard output could not be written, such as a file on a full disk; what is left of it is then dropped."""
    stream = sys.stdout
    if not isinstance(stream, Output) or not stream.failed:
        return False
    stream.drop()
    return True


def prepare_output() -> None:
    """Make the streams print texts that their encoding lacks as escapes (an ASCII locale), and the library's warnings pass a console."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = Output(sys.stdout)  # type: ignore[assignment]
    logging.getLogger("vitarium").addHandler(_LogLines())


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return SafeConsole(stderr=stderr, width=wide, highlight=False)


def out() -> Console:
    """Return the console of results, stdout."""
    return _console(stderr=False)


def err() -> Console:
    """Return the console of progress, notes and errors, stderr, so that a pipe carries results only."""
    return _console(stderr=True)


def print_json(value: Any) -> None:
    """Print JSON on stdout, neither wrapped nor coloured."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    sys.stdout.write(HARMFUL.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text) + "\n")


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table. A column whose name begins with ">" is aligned to the right; one with "~" folds first on a narrow terminal."""
    style = dict(title_justify="left", title_style="bold", header_style="cyan", pad_edge=False, show_edge=False, collapse_padding=True)
    result = Table(box=box.SIMPLE_HEAD, title=title and f"\n{title}", **style)  # type: ignore[arg-type]
    for name in columns:
        result.add_column(
            name.lstrip(">~"), justify="right" if name[:1] == ">" else "left", overflow="fold", no_wrap=not name.startswith("~")
        )
    return result


def pairs(rows: dict[str, Any], title: str | None = None) -> Table:
    """Return a table of names and values."""
    style = dict(title_justify="left", title_style="bold", pad_edge=False)
    result = Table(box=None, show_header=False, title=title and f"\n{title}", **style)  # type: ignore[arg-type]
    result.add_column(style="cyan", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows.items():
        result.add_row(name, value if hasattr(value, "__rich_console__") else escape(str(value)))
    return result


def note(text: str) -> None:
    """Print a note, such as the report of a method, on stderr."""
    err().print(text.rstrip("\n"), markup=False, style="dim")


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Show the latest message of a verb while it runs; messages that end with a line break (reports of methods) are printed permanently."""
    console = err()
    with console.status("") as shown:

        def notify(text: str) -> None:
            if text.endswith("\n"):
                note(text)
            else:
                shown.update(escape(printable(text)))

        yield notify


def print_tables(tables: Iterable[TableData]) -> None:
    """Print tables of a result on stdout."""
    for data in tables:
        shown = table(*data.columns, title=data.title or None)
        for row in data.rows:
            shown.add_row(*map(escape, row))
        out().print(shown)
