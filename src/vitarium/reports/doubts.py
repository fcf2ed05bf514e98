"""Held-out images whose label may be wrong: several models agree against it, each with high confidence.

Only the most confident mistakes that each model's trial keeps are looked at (see `Classify.extras`), so nothing is computed again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vitarium.reports.results import Comparison
from vitarium.training.tasks import GalleryData, GalleryImage

CERTAIN = 0.7
"""Confidence from which a model's answer counts against a label."""
SHOWN = 12
"""Images of the section."""


def possible_wrong_labels(comparison: Comparison) -> GalleryData | None:
    """Return the held-out images on which two models or more, and at least half of all, give the same answer against the label.

    Args:
        comparison: of any task; without classes, or with one model, nothing is found.

    Returns:
        the section of a report, those with most models first; None if there are no such images.
    """
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for trial in comparison.trials:
        for mistake in trial.extras.get("mistakes", []):
            if mistake["confidence"] >= CERTAIN:
                found[mistake["index"], mistake["predicted"]].append(mistake)
    needed = max(2, (len(comparison.trials) + 1) // 2)
    agreed = [mistakes for mistakes in found.values() if len(mistakes) >= needed]
    agreed.sort(key=lambda mistakes: (-len(mistakes), -_confidence(mistakes)))
    if not agreed:
        return None
    words = (
        "On these held-out images several models give the same answer against the label, each with a probability of "
        f"{100 * CERTAIN:.0f} % or more: look at them, and correct the labels that are wrong."
    )
    return GalleryData("Possible wrong labels", words, [_shown(mistakes, comparison) for mistakes in agreed[:SHOWN]])


def _confidence(mistakes: list[dict[str, Any]]) -> float:
    return sum(mistake["confidence"] for mistake in mistakes) / len(mistakes)


def _shown(mistakes: list[dict[str, Any]], comparison: Comparison) -> GalleryImage:
    first, classes = mistakes[0], comparison.classes
    answer, label = classes[first["predicted"]], classes[first["true"]]
    return GalleryImage(
        index=first["index"],
        source=first["image"],
        answer=answer,
        note=f"{100 * _confidence(mistakes):.0f} %, {len(mistakes)} of {len(comparison.trials)} models",
        truth=f"label {label}",
        description=f"An image with the label {label} that {len(mistakes)} models classified as {answer}",
    )
