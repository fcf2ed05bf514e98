"""Test of a learning curve: had it flattened when the training ended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitarium.training.tasks import Metric

FEWEST = 6
"""Evaluations below which a curve has no shape."""
SHARE = 0.05
"""Least gain over the last third, as a share of that of the whole curve, that counts."""


def still_improving(history: Sequence[dict[str, float]], metric: Metric) -> float | None:
    """Return the gain of the last third of a curve where it is above the noise, else None.

    A line is fitted to the last third of the evaluations (at least four). Its gain counts as improvement where it exceeds twice its
    standard error, from the scatter of the points about the line, and `SHARE` of the range of the whole curve.

    Args:
        history: points, each with "step"; those with the metric's name are its evaluations.
        metric: larger or smaller is better.

    Returns:
        the gain in the metric's unit, above 0 for better; None for a flat or falling curve, and for fewer than `FEWEST` evaluations.
    """
    points = [(point["step"], -metric.rank(point[metric.name])) for point in history if metric.name in point]
    if len(points) < FEWEST:
        return None
    steps, scores = np.array(points, float).T
    last = max(4, -(-len(points) // 3))
    x, y = steps[-last:] - steps[-last:].mean(), scores[-last:]
    slope = float(x @ y / (x @ x))
    scatter = float(np.square(y - y.mean() - slope * x).sum() / (last - 2))
    gain, error = slope * float(np.ptp(x)), (scatter / float(x @ x)) ** 0.5 * float(np.ptp(x))
    return gain if gain > 2 * error and gain > SHARE * float(np.ptp(scores)) else None
