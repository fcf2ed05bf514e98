"""What is in a scene and where it stands, before anything is drawn. All lengths are shares of the picture's side; depths are metres.

The camera looks along level ground from EYE metres above it. Ground that is seen at height y lies at depth FOCAL * EYE / (y - horizon),
so things further away stand higher in the picture and look smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vitarium.data.scenes.shapes import FEET, SHAPES

THINGS = tuple(SHAPES)
STUFF = ("sky", "hills", "grass", "sand", "snow", "water")
CATEGORIES = THINGS + STUFF
"""Category number -> name: the things that can be counted, then the stuff that cannot."""

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
    """Something that stands on the ground or hovers above it.

    Args:
        kind, colour, texture: names.
        x: of its middle, from the left edge.
        base: height in the picture, from the top edge, of the ground below it.
        size: diameter of the circle around it.
        lift: how far it hovers above the ground.
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
        """Of its middle, from the top edge."""
        return self.base - self.lift - FEET[self.kind] * self.size / 2

    @property
    def category(self) -> int:
        """Its place in CATEGORIES."""
        return THINGS.index(self.kind)

    def __str__(self) -> str:
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"{self.colour}{texture} {self.kind}"


@dataclass(frozen=True)
class Layout:
    """A scene's content; `things` from the nearest, which is the scene's subject, to the furthest."""

    ground: str
    sky: str
    horizon: float
    hills: bool
    things: tuple[Thing, ...] = field(repr=False)


def lay_out(rng: np.random.Generator, subject: str) -> Layout:
    """A random scene whose nearest and largest thing is of the kind `subject`, wholly inside the picture."""
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
    room = base - (1 + FEET[kind]) * size / 2 - 0.02  # above a thing that stands on the ground
    lift = rng.uniform(0.0, room) if rng.random() < 0.3 and room > 0 else 0.0
    colour, texture = list(COLOURS)[rng.integers(len(COLOURS))], TEXTURES[rng.integers(len(TEXTURES))]
    angle = rng.uniform(-0.35, 0.35)
    return Thing(kind, colour, texture, float(x), float(base), float(size), float(lift), angle, FOCAL * EYE / (base - horizon))
