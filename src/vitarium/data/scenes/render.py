"""Rendering of a scene: ground and sky first, then shadows, then objects from the furthest to the nearest, with soft edges."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.layout import CATEGORIES, COLOURS, EYE, FAR, FOCAL, HILLS, Layout, Thing
from vitarium.data.scenes.shapes import SHAPES, Field

MIN_PIXELS = 14 / 64**2
"""Smallest visible share of the image (MIN_VISIBLE: of the object itself); objects with less are left out of the scene."""
MIN_VISIBLE = 0.3


def _colours(**rows: Any) -> dict[str, Field]:
    return {name: np.array(row, np.float32) for name, row in rows.items()}


THING_COLOURS = _colours(**COLOURS)
SKY_COLOURS = _colours(  # at the top, at the horizon, clouds
    clear=((70, 130, 220), (190, 220, 245), (255, 255, 255)),
    cloudy=((130, 150, 175), (205, 212, 220), (245, 246, 248)),
    evening=((74, 70, 140), (252, 176, 110), (250, 150, 130)),
    night=((10, 14, 40), (48, 58, 104), (70, 78, 120)),
)
CLOUDS = {"clear": 0.25, "cloudy": 0.75, "evening": 0.5, "night": 0.35}
DAYLIGHT = _colours(clear=(1.0, 1.0, 1.0), cloudy=(0.92, 0.93, 0.95), evening=(1.0, 0.86, 0.78), night=(0.52, 0.56, 0.74))
GROUND_COLOURS = _colours(grass=(104, 158, 66), sand=(222, 194, 138), snow=(232, 238, 246), water=(44, 112, 168))
ROUGHNESS = {"grass": 0.3, "sand": 0.13, "snow": 0.06, "water": 0.3}
HILL_COLOURS = _colours(grass=(74, 122, 84), sand=(182, 140, 100), snow=(170, 186, 206), water=(84, 118, 112))


@dataclass(frozen=True)
class Drawing:
    """A rendered scene.

    Args:
        image: uint8 (H, W, 3).
        depth: float32 (H, W), metres; the sky's is FAR.
        categories: uint8 (H, W), indices into CATEGORIES: the semantic map.
        instances: int32 (H, W), i + 1 where things[i] is visible, 0 elsewhere.
        things: the visible objects, from the nearest to the furthest.
    """

    image: NDArray[np.uint8]
    depth: Field
    categories: NDArray[np.uint8]
    instances: NDArray[np.int32]
    things: tuple[Thing, ...]


@dataclass
class _Patch:
    """An object's part of the image: the area, its own coordinates, its distances (in radii) and its coverage of each pixel."""

    window: tuple[slice, slice]
    u: Field
    v: Field
    distance: Field
    cover: Field
    pixels_per_radius: float


def draw(layout: Layout, rng: np.random.Generator, size: int) -> Drawing:
    """Render a scene at size x size pixels."""
    image, depth, categories = _background(layout, rng, size)
    instances = np.zeros((size, size), np.int32)
    free = np.ones((size, size), bool)
    seen: list[tuple[Thing, _Patch]] = []
    for thing in layout.things:  # from the nearest: free pixels belong to objects behind
        patch = _place(thing, size)
        solid = patch.cover >= 0.5
        visible = int(np.count_nonzero(solid & free[patch.window]))
        if visible >= max(MIN_PIXELS * size * size, MIN_VISIBLE * np.count_nonzero(solid)):
            seen.append((thing, patch))
            free[patch.window] &= ~solid
    for thing, _ in seen:
        _shade_ground(image, thing, layout, size)
    haze = SKY_COLOURS[layout.sky][1]
    for number, (thing, patch) in reversed(list(enumerate(seen, start=1))):
        colour = _paint(thing, patch) * (0.5 + 0.5 * DAYLIGHT[layout.sky])  # weak enough that colour names remain valid
        colour += (haze - colour) * _haze(thing.depth)
        part, cover = image[patch.window], patch.cover[..., None]
        part += (colour - part) * cover
        solid = patch.cover >= 0.5
        depth[patch.window][solid] = thing.depth
        categories[patch.window][solid] = thing.category
        instances[patch.window][solid] = number
    return Drawing(to_uint8(image), depth, categories, instances, tuple(thing for thing, _ in seen))


def to_uint8(image: Field) -> NDArray[np.uint8]:
    """Round and clip to 0..255, in place."""
    image += 0.5
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


@functools.lru_cache(maxsize=8)
def clouds_of(size: int) -> Field:
    """Return periodic cloud-like noise (its amplitude falls with frequency), size x size; mean 0, deviation 1."""
    rng = np.random.default_rng(20210325)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**1.4
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _grain_of(size: int) -> Field:
    """Return `clouds_of` with finer structure: its slow waves are removed."""
    noise = clouds_of(size)
    slow = (np.roll(noise, 8, 0) + np.roll(noise, -8, 0) + np.roll(noise, 8, 1) + np.roll(noise, -8, 1)) / 4
    grain = noise - slow
    return grain / grain.std()


def _background(layout: Layout, rng: np.random.Generator, size: int) -> tuple[Field, Field, NDArray[np.uint8]]:
    """Render sky, hills and ground: image (size, size, 3) on the scale 0..255, depth, categories."""
    offsets = rng.integers(0, 4 * size, 4)
    image = np.empty((size, size, 3), np.float32)
    depth = np.full((size, size), FAR, np.float32)
    categories = np.full((size, size), CATEGORIES.index("sky"), np.uint8)
    rows = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    first = int(np.ceil(layout.horizon * size - 0.5))  # first row of the ground
    _draw_sky(image, layout, offsets, rows, first)
    if layout.hills:
        _draw_hills(image, depth, categories, layout, offsets, rows, first)
    ground_depth = np.minimum(FOCAL * EYE / np.maximum(rows[first:] - layout.horizon, 1e-3), FAR)
    depth[first:] = ground_depth[:, None]
    categories[first:] = CATEGORIES.index(layout.ground)
    _draw_ground(image[first:], layout, offsets, ground_depth)
    return image, depth, categories


def _draw_sky(image: Field, layout: Layout, offsets: NDArray[np.int64], rows: Field, first: int) -> None:
    size = len(image)
    top, low, cloud = SKY_COLOURS[layout.sky]
    height = (rows[:first] / layout.horizon)[:, None]
    image[:first] = (top + (low - top) * height)[:, None]
    noise = clouds_of(4 * size)
    across, down = (np.arange(size) + offsets[0]) % (4 * size), (2 * np.arange(first) + offsets[1]) % (4 * size)
    amount = noise[down[:, None], across[None, :]] * 0.9 + 2.2 * CLOUDS[layout.sky] - 1.1
    amount = np.clip(amount, 0, 1) * (0.85 - 0.5 * height)
    image[:first] += (cloud - image[:first]) * amount[..., None]


def _draw_hills(
    image: Field, depth: Field, categories: NDArray[np.uint8], layout: Layout, offsets: NDArray[np.int64], rows: Field, first: int
) -> None:
    size = len(image)
    across = np.arange(size, dtype=np.float32) * np.float32(2 * np.pi / size)
    waves = sum(np.sin(across * per_picture + phase) / per_picture for per_picture, phase in zip((0.9, 2.3, 5.1), offsets[:3], strict=True))
    height = 0.1 + 0.06 * waves + 0.004 * clouds_of(4 * size)[offsets[3], : 2 * size : 2]
    top = max(int((layout.horizon - 0.22) * size), 0)
    cover = np.clip((rows[top:first, None] - (layout.horizon - height)) * size + 0.5, 0, 1)
    colour = HILL_COLOURS[layout.ground] * DAYLIGHT[layout.sky]
    colour += (SKY_COLOURS[layout.sky][1] - colour) * (0.8 * _haze(HILLS))
    image[top:first] += (colour - image[top:first]) * cover[..., None]
    solid = cover >= 0.5
    depth[top:first][solid] = HILLS
    categories[top:first][solid] = CATEGORIES.index("hills")


def _draw_ground(part: Field, layout: Layout, offsets: NDArray[np.int64], depth: Field) -> None:
    """Return noise that lies on the ground: its coordinates are metres."""
    size = part.shape[1]
    texels = 0.4 * size  # per metre
    side = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    across = side[None, :] * (depth / FOCAL)[:, None] * (texels * (0.25 if layout.ground == "water" else 1.0))
    down = depth * texels * (0.6 if layout.ground == "water" else 1.0)
    grain = _grain_of(4 * size)
    noise = grain[(down.astype(np.int64) + offsets[1])[:, None] % (4 * size), (across.astype(np.int64) + offsets[0]) % (4 * size)]
    strength = ROUGHNESS[layout.ground] * np.minimum(1, 5 / depth)  # far away it averages out
    light = 1 + strength[:, None] * np.clip(noise, -2, 2) * 0.5
    part[:] = GROUND_COLOURS[layout.ground] * light[..., None] * DAYLIGHT[layout.sky]
    far = _haze(depth)[:, None, None]
    if layout.ground == "water":
        far = np.maximum(far, 0.25)  # water mirrors the sky
    part += (SKY_COLOURS[layout.sky][1] - part) * far


def _haze(depth: Field | float) -> Field:
    return np.asarray(0.8 * (1 - np.exp(-np.asarray(depth) / 45.0)), np.float32)


def around(x: float, y: float, radius: float, angle: float, size: int) -> tuple[tuple[slice, slice], Field, Field]:
    """Return the part of an image that a disc may touch, with coordinates u, v: 0 at its centre, 1 at one radius, rotated by the angle.

    Args:
        x, y, radius: pixels.
        angle: radians, clockwise.
        size: side of the image, pixels.
    """
    left, right = max(int(x - radius - 1), 0), min(int(x + radius + 2), size)
    top, bottom = max(int(y - radius - 1), 0), min(int(y + radius + 2), size)
    across = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)) / np.float32(radius)
    down = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y))[:, None] / np.float32(radius)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    return (slice(top, bottom), slice(left, right)), cosine * across + sine * down, cosine * down - sine * across


def _place(thing: Thing, size: int) -> _Patch:
    radius = thing.size * size / 2
    window, u, v = around(thing.x * size, thing.y * size, radius, thing.angle, size)
    distance = SHAPES[thing.kind](u, v)
    return _Patch(window, u, v, distance, np.clip(0.5 - distance * np.float32(radius), 0, 1), radius)


def _paint(thing: Thing, patch: _Patch) -> Field:
    """Return an object's own colours, (h, w, 3): texture, light from the upper left, a rounded rim."""
    colour = THING_COLOURS[thing.colour]
    light = 0.95 - 0.2 * (0.6 * patch.u + patch.v)
    light *= 0.66 + 0.34 * np.sqrt(np.clip(patch.distance * -4.5, 0, 1))
    light += 0.35 * np.clip(1 - 6 * ((patch.u + 0.3) ** 2 + (patch.v + 0.38) ** 2), 0, 1)
    if thing.texture == "plain":
        return colour * light[..., None]
    other = colour * np.float32(0.55) if colour.mean() > 150 else colour * np.float32(0.45) + np.float32(140)
    return (colour + (other - colour) * _texture(thing.texture, patch)[..., None]) * light[..., None]


def _texture(name: str, patch: _Patch) -> Field:
    """Return the share of the second colour at each pixel."""
    waves = np.float32(8.5)  # radians per radius
    edge = patch.pixels_per_radius / 8.5 * 1.2  # from one colour to the other within about a pixel
    if name == "striped":
        wave = np.sin((patch.u + patch.v) * np.float32(0.7071) * waves)
    elif name == "dotted":
        wave = np.cos(patch.u * waves) * np.cos(patch.v * waves) - np.float32(0.35)
    else:
        wave = np.sin(patch.u * waves) * np.sin(patch.v * waves)
    return np.clip(0.5 + wave * np.float32(edge), 0, 1)


def _shade_ground(image: Field, thing: Thing, layout: Layout, size: int) -> None:
    """Darken the ground below an object softly; the shadow is paler and wider the higher it hovers."""
    wide = thing.size * size * (0.48 + 0.3 * thing.lift)
    flat = wide * 0.26
    x, y = thing.x * size, thing.base * size
    left, right = max(int(x - 1.5 * wide), 0), min(int(x + 1.5 * wide) + 1, size)
    top, bottom = max(int(y - 1.5 * flat), int(np.ceil(layout.horizon * size)), 0), min(int(y + 1.5 * flat) + 2, size)
    across = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)) / np.float32(wide)
    down = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y))[:, None] / np.float32(flat)
    dark = np.clip(1.25 - (across * across + down * down), 0, 1) * np.float32(0.5 / (1 + 3 * thing.lift))
    image[top:bottom, left:right] *= (1 - dark)[..., None]
