"""The result of a verb: values with a short text, a table for notebooks, and a plain dictionary."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from vitarium.errors import WriteError
from vitarium.pages.tables import TableData

if TYPE_CHECKING:
    from PIL import Image

SHOWN_ROWS = 50
"""Number of rows of a table in a notebook; further ones are counted."""
LONGEST_FACT = 160
"""Characters of a value in the text of a result; warnings may be longer."""
SHOWN_DRAWINGS, SHOWN_SIDE = 12, 320
"""Largest number of drawings in a notebook, and the longest side of one in pixels."""


@contextlib.contextmanager
def kept(result: Result) -> Iterator[None]:
    """Keep a result in the error of its file, so that what was computed is not lost with it: `error.result`, which the commands print."""
    try:
        yield
    except WriteError as error:
        error.result = result
        raise


class Result:
    """Base of all results. A subclass is a dataclass; it overrides `facts`, and `tables` if it has any."""

    facts_beside_tables: ClassVar[bool] = True
    """True if the facts hold more than the tables, so that a command prints both."""

    def facts(self) -> dict[str, Any]:
        """Return the most important values by readable names."""
        return {}

    def tables(self) -> list[TableData]:
        """Return the tables of the result."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain values, as printed with --json."""
        return asdict(self)  # type: ignore[call-overload]

    def __repr__(self) -> str:
        facts = {name: str(value) for name, value in self.facts().items()}
        shown = (f"{name}: {text if len(text) <= LONGEST_FACT else f'{text[:LONGEST_FACT]}...'}" for name, text in facts.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """Return the facts and tables as HTML; Jupyter shows it."""
        return html_table(TableData("", [], [[name, str(value)] for name, value in self.facts().items()])) + "".join(
            html_table(table) for table in self.tables()
        )


def html_table(table: TableData) -> str:
    """Return a table as HTML, with all text escaped."""
    right = [aligned for _, aligned in table.headers]

    def row(cells: Sequence[str], tag: str) -> str:
        aligned = [" style='text-align: right'" if i < len(right) and right[i] else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{a}>{html.escape(c)}</{tag}>" for a, c in zip(aligned, cells, strict=True)) + "</tr>"

    head = row([name for name, _ in table.headers], "th") if table.columns else ""
    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    more = len(table.rows) - SHOWN_ROWS
    rest = f"<tr><td colspan='{max(1, len(table.columns))}'>and {more} more</td></tr>" if more > 0 else ""
    return f"<table>{caption}{head}{''.join(row(cells, 'td') for cells in table.rows[:SHOWN_ROWS])}{rest}</table>"


def html_drawing(drawn: Image.Image, title: str = "", *, side: int | None = SHOWN_SIDE) -> str:
    """Return a drawing as HTML with the PNG inside; larger ones are reduced to `side` pixels (None: never)."""
    shown = drawn.convert("RGB")
    if side is not None:
        shown.thumbnail((side, side))
    file = io.BytesIO()
    shown.save(file, format="png")
    return f"<img title='{html.escape(title)}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
