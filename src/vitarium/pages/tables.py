"""Tables as plain values, which a terminal, a notebook and a report show each in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TableData:
    """A table of a report.

    Attributes:
        title: caption.
        columns: headers; ">" in front aligns to the right, "~" marks the columns that fold first on a narrow terminal.
        rows: cells as text, one list per row.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    @property
    def headers(self) -> list[tuple[str, bool]]:
        """Headers without their marks, and whether each column is aligned to the right."""
        return [(name.lstrip("~>"), name.startswith(">")) for name in self.columns]

    def values(self) -> dict[str, Any]:
        """Return the table as values of a page's template."""
        return dict(kind="table", title=self.title, columns=self.headers, rows=self.rows)
