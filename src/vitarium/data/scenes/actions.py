"""Motion clips: an object moves in one of six ways. Single frames have the same distribution for all six; only motion separates them.

Objects that leave the image enter it on the opposite side, so that positions are uniform at every time, whatever the motion.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import around, clouds_of, to_uint8
from vitarium.data.scenes.shapes import SHAPES, Field

ACTIONS = ("left", "right", "up", "down", "circle", "bounce")
FRAMES = 16
DISTANCE = 0.7
"""Distance covered during a clip, in image sides, varied by a fifth."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def action_label(index: int) -> int:
    """Return the index into ACTIONS; the actions alternate."""
    return index % len(ACTIONS)


def path_of(action: str, rng: np.random.Generator) -> Field:
    """Return the centre of the object in each frame, (FRAMES, 2), x and y in image sides, before wrapping."""
    start, far = rng.uniform(0, 1, 2), DISTANCE * rng.uniform(0.8, 1.2)
    time = np.linspace(0, 1, FRAMES)[:, None]
    if action == "circle":
        angle = 2 * np.pi * (rng.uniform() + rng.choice((-1, 1)) * time)
        return start + far / 3 * np.concatenate((np.cos(angle), np.sin(angle)), 1)
    if action == "bounce":  # back and forth along one axis, turning in the middle half of the clip
        turn = rng.uniform(0.25, 0.75)
        time = turn - np.abs(time - turn)
        direction = list(DIRECTIONS.values())[rng.integers(4)]
        return start + far * time * np.array(direction)
    return start + far * time * np.array(DIRECTIONS[action])


def draw_action(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """Render the clip of an index, uint8 (FRAMES, size, size, 3): an object of random shape, size, angle and colour on a static ground."""
    rng = np.random.default_rng((seed, index))
    noise, (top, left) = clouds_of(2 * size), rng.integers(0, size, 2)
    ground = np.float32(rng.uniform(30, 110, 3)) * (1 + 0.2 * np.clip(noise[top : top + size, left : left + size, None], -2, 2))
    colour = rng.uniform(150, 255, 3).astype(np.float32)
    shape = list(SHAPES.values())[rng.integers(len(SHAPES))]
    radius, angle = size * rng.uniform(0.11, 0.17), rng.uniform(-0.3, 0.3)
    frames = np.repeat(ground[None].astype(np.float32), FRAMES, 0)
    for frame, place in zip(frames, path_of(ACTIONS[action_label(index)], rng) % 1 * size, strict=True):
        for x, y in ((place[0] + i * size, place[1] + j * size) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            if -radius < x < size + radius and -radius < y < size + radius:
                window, u, v = around(x, y, radius, angle, size)
                cover = np.clip(0.5 - shape(u, v) * np.float32(radius), 0, 1)
                frame[window] += (colour - frame[window]) * cover[..., None]
    return to_uint8(frames)
