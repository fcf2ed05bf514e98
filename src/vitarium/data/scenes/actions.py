"""Motion clips: one thing moves in one of six ways. Each frame alone is the same for all of them: only the motion tells.

What leaves the picture comes in again on the other side, so that at every moment the thing is anywhere with equal chance, whatever it does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitarium.data.scenes.render import around, clouds_of, to_uint8
from vitarium.data.scenes.shapes import SHAPES, Field

ACTIONS = ("left", "right", "up", "down", "circle", "bounce")
FRAMES = 16
DISTANCE = 0.7
"""How far the thing gets during a clip, in picture sides, give or take a fifth."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def action_label(index: int) -> int:
    """Number into ACTIONS: they take turns."""
    return index % len(ACTIONS)


def path_of(action: str, rng: np.random.Generator) -> Field:
    """Where the thing's middle is in each frame, (FRAMES, 2) as x and y in picture sides, not yet brought back into the picture."""
    start, far = rng.uniform(0, 1, 2), DISTANCE * rng.uniform(0.8, 1.2)
    time = np.linspace(0, 1, FRAMES)[:, None]
    if action == "circle":
        angle = 2 * np.pi * (rng.uniform() + rng.choice((-1, 1)) * time)
        return start + far / 3 * np.concatenate((np.cos(angle), np.sin(angle)), 1)
    if action == "bounce":  # there and back along one axis, with the turn somewhere in the middle half
        turn = rng.uniform(0.25, 0.75)
        time = turn - np.abs(time - turn)
        direction = list(DIRECTIONS.values())[rng.integers(4)]
        return start + far * time * np.array(direction)
    return start + far * time * np.array(DIRECTIONS[action])


def draw_action(index: int, seed: int, size: int) -> NDArray[np.uint8]:
    """The clip of a number, uint8 (FRAMES, size, size, 3): a thing of random shape, size, angle and colour on a cloudy ground at rest."""
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
