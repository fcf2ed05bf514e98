"""Tables as plain values, which a terminal, a notebook and a report show each in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field


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
