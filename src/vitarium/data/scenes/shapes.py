"""Outlines of objects as signed distances: negative inside, zero on the outline, positive outside.

Each function takes coordinates u (right) and v (down), float32 arrays of one shape, in units in which the object fits into the circle of
radius 1 around the origin, and returns distances in the same units (exact, or close enough for a soft edge).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]


def circle(u: Field, v: Field) -> Field:
    """Return the distance to a disc."""
    return np.sqrt(u * u + v * v) - 0.92


def square(u: Field, v: Field) -> Field:
    """Distance to a square with slightly rounded corners."""
    return _box(u, v, 0.67, 0.67) - 0.06


def triangle(u: Field, v: Field) -> Field:
    """Distance to a triangle that stands on a side."""
    return np.maximum(np.abs(u) * 0.8944 - v * 0.4472 - 0.42, v - 0.62)


def star(u: Field, v: Field) -> Field:
    """Distance to a star with five points, one up."""
    return _star(u, v, points=5, outer=1.0, inner=0.44)


def heart(u: Field, v: Field) -> Field:
    """Distance to a heart: two discs on a wedge."""
    u = np.abs(u)
    lobe = np.sqrt((u - 0.42) ** 2 + (v + 0.3) ** 2) - 0.47
    wedge = np.maximum((u + v) * 0.7071 - 0.56, -(v + 0.08))
    return np.minimum(lobe, np.maximum(wedge, u - 0.89))


def ring(u: Field, v: Field) -> Field:
    """Distance to a disc with a hole."""
    return np.abs(np.sqrt(u * u + v * v) - 0.68) - 0.24


def cross(u: Field, v: Field) -> Field:
    """Distance to an upright plus sign."""
    return np.minimum(_box(u, v, 0.9, 0.29), _box(u, v, 0.29, 0.9)) - 0.02


def crescent(u: Field, v: Field) -> Field:
    """Distance to a crescent: a disc without a smaller one to its right."""
    return np.maximum(np.sqrt(u * u + v * v) - 0.92, 0.72 - np.sqrt((u - 0.42) ** 2 + (v + 0.12) ** 2))


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    shape.__name__: shape for shape in (circle, square, triangle, star, heart, ring, cross, crescent)
}

FEET = dict(circle=0.92, square=0.73, triangle=0.62, star=0.81, heart=0.79, ring=0.92, cross=0.92, crescent=0.92)
"""Distance from the centre of each shape down to the ground on which it stands."""


def _box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    du, dv = np.abs(u) - half_width, np.abs(v) - half_height
    outside = np.sqrt(np.maximum(du, 0) ** 2 + np.maximum(dv, 0) ** 2)
    return outside + np.minimum(np.maximum(du, dv), 0)


def _star(u: Field, v: Field, points: int, outer: float, inner: float) -> Field:
    sector = math.pi / points
    angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)  # folded onto half of one point of the star
    radius = np.sqrt(u * u + v * v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge_along, edge_across = inner * math.cos(sector) - outer, inner * math.sin(sector)
    return ((along - outer) * edge_across - across * edge_along) / math.hypot(edge_along, edge_across)
