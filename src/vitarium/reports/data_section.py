"""The section of a comparison's page on its data: sizes, a sheet of examples, and the images of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitarium.pages import embed_image
from vitarium.reports.results import Comparison

if TYPE_CHECKING:
    from PIL import Image

MOST_CLASSES = 24
"""Rows of the table of classes; of more, the largest and the smallest are shown."""
SMALLEST = 6
"""Rows of the smallest classes, where not all are shown."""


def describe(comparison: Comparison, examples: Mapping[int, Image.Image | None]) -> dict[str, Any]:
    """Return the values of the section: "words", "examples", "columns" and "rows" of the table of classes.

    Args:
        examples: the images of `comparison.inspection.examples`, by their place; None where one cannot be read.
    """
    inspection = comparison.inspection
    shown = [
        dict(label=one.label, source=one.source, image=embed_image(examples[one.index]))
        for one in inspection.examples
        if examples.get(one.index) is not None
    ]
    return dict(
        words=_words(comparison), examples=shown, columns=[("class", False), ("training", True), ("held out", True)], rows=_rows(comparison)
    )


def _words(comparison: Comparison) -> str:
    sizes, counts = comparison.inspection.sizes, comparison.images
    parts = [f"{counts['train']:,} training and {counts['val']:,} held-out images"]
    if sizes:
        least, median, most = ("x".join(map(str, sizes[name])) for name in ("least", "median", "most"))
        parts.append(f"of {median} pixels" if least == most else f"of {least} to {most} pixels, {median} in the median")
    return " ".join(parts) + "."


def _rows(comparison: Comparison) -> list[list[str]]:
    """Return [class, training images, held-out images] as text: all in their order, or the largest and the smallest classes."""
    rows = [(name, train, val) for name, (train, val) in zip(comparison.classes, comparison.inspection.counts, strict=False)]
    if len(rows) > MOST_CLASSES:
        ordered = sorted(rows, key=lambda row: -row[1])
        first, others, last = ordered[: MOST_CLASSES - SMALLEST], ordered[MOST_CLASSES - SMALLEST : -SMALLEST], ordered[-SMALLEST:]
        rows = [*first, (f"{len(others)} others", sum(row[1] for row in others), sum(row[2] for row in others)), *last]
    return [[name, f"{train:,}", f"{val:,}"] for name, train, val in rows]
