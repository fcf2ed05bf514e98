"""Content and geometry of a scene, before it is rendered. All lengths are shares of the image's side; depths are in metres.

The camera looks along level ground from EYE metres above it. Ground at image height y has the depth FOCAL * EYE / (y - horizon), so objects
further away are higher in the image and smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vitarium.data.scenes.shapes import FEET, SHAPES

THINGS = tuple(SHAPES)
STUFF = ("sky", "hills", "grass", "sand", "snow", "water")
CATEGORIES = THINGS + STUFF
"""Category number -> name: first the countable things, then the uncountable stuff."""

GROUNDS = STUFF[2:]
SKIES = ("clear", "cloudy", "evening", "night")
TEXTURES = ("plain", "striped", "dotted", "checked")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 132, 30),
    "yellow": (247, 208, 56),
    "green": (46, 160, 67),
    "cyan": (38, 190, 200),
    "blue": (45, 98, 220),
    "purple": (136, 72, 196),
    "pink": (240, 120, 176),
    "white": (240, 240, 236),
    "black": (44, 44, 52),
}

EYE, FOCAL = 1.6, 1.2
FAR, HILLS = 100.0, 60.0
MAX_THINGS = 6


@dataclass(frozen=True)
class Thing:
    """An object that stands on the ground or hovers above it.

    Args:
        kind, colour, texture: names.
        x: centre, from the left edge.
        base: height in the image, from the top edge, of the ground below it.
        size: diameter of the circle around it.
        lift: height above the ground.
        angle: radians, clockwise.
        depth: metres from the camera.
    """

    kind: str
    colour: str
    texture: str
    x: float
    base: float
    size: float
    lift: float
    angle: float
    depth: float

    @property
    def y(self) -> float:
        """Height of the centre, from the top edge."""
        return self.base - self.lift - FEET[self.kind] * self.size / 2

    @property
    def category(self) -> int:
        """Index into CATEGORIES."""
        return THINGS.index(self.kind)

    def __str__(self) -> str:
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"{self.colour}{texture} {self.kind}"


@dataclass(frozen=True)
class Layout:
    """Content of a scene. `things` are ordered from near to far; the first is the scene's subject."""

    ground: str
    sky: str
    horizon: float
    hills: bool
    things: tuple[Thing, ...] = field(repr=False)


def lay_out(rng: np.random.Generator, subject: str) -> Layout:
    """Return a random scene whose nearest and largest object is of the kind `subject` and wholly inside the image."""
    horizon = rng.uniform(0.3, 0.48)
    size, base = rng.uniform(0.3, 0.52), rng.uniform(0.8, 0.96)
    first = _thing(rng, subject, horizon, base, size, x=rng.uniform(size / 2, 1 - size / 2))
    things = [first]
    for _ in range(rng.integers(MAX_THINGS)):
        base = horizon + 0.06 + (first.base - 0.04 - horizon - 0.06) * rng.uniform() ** 0.8
        nearness = (base - horizon) / (first.base - horizon)
        size = np.clip(first.size * nearness * rng.uniform(0.5, 1.6), 0.11, 0.75 * first.size)
        things.append(_thing(rng, THINGS[rng.integers(len(THINGS))], horizon, base, size, x=rng.uniform(size / 4, 1 - size / 4)))
    things.sort(key=lambda thing: thing.depth)
    ground, sky = GROUNDS[rng.integers(len(GROUNDS))], SKIES[rng.integers(len(SKIES))]
    return Layout(ground, sky, horizon, hills=bool(rng.random() < 0.6), things=tuple(things))


def _thing(rng: np.random.Generator, kind: str, horizon: float, base: float, size: float, x: float) -> Thing:
    room = base - (1 + FEET[kind]) * size / 2 - 0.02  # above an object that stands on the ground
    lift = rng.uniform(0.0, room) if rng.random() < 0.3 and room > 0 else 0.0
    colour, texture = list(COLOURS)[rng.integers(len(COLOURS))], TEXTURES[rng.integers(len(TEXTURES))]
    angle = rng.uniform(-0.35, 0.35)
    return Thing(kind, colour, texture, float(x), float(base), float(size), float(lift), angle, FOCAL * EYE / (base - horizon))
