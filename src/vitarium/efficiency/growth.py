"""The size from which a method makes a model faster: measured on plain vision transformers of growing width, on this machine.

A method saves arithmetic and adds work of its own (rounding, sorting, smaller calls). In a small model the additions dominate. `growth`
times the method on a ladder of models, `RUNGS`, and stops at the first that it makes faster.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vitarium.catalog.applying import apply
from vitarium.catalog.calling import example_image
from vitarium.catalog.create import create_model
from vitarium.catalog.methods import Method
from vitarium.efficiency.timing import paired
from vitarium.errors import UsageError

RUNGS = ((64, 64), (128, 96), (192, 160), (384, 224), (768, 224))
"""Width, and side of the image in pixels, of each model: four blocks on patches of 16 pixels."""
ROUNDS, SECONDS, CLEAR = 3, 0.05, 1.05
"""Turns of each model, least duration of a turn in seconds, and the ratio from which a model counts as faster."""


@dataclass(frozen=True)
class Rung:
    """The effect of a method on one model of the ladder.

    Attributes:
        width: channels of a token.
        tokens: number of tokens.
        speedup: time before over time after, median of the rounds.
    """

    width: int
    tokens: int
    speedup: float

    def __str__(self) -> str:
        return f"{self.width}: {self.speedup:.2f}x"


def growth(method: Method, *, batch: int = 1, device: torch.device | str = "cpu", seconds: float = 20.0) -> list[Rung]:
    """Time a method on growing models until it makes one faster, or the time is over.

    Args:
        method: with its options; the steps of a calibrated quantizer are taken from random images, as they do not change its speed.
        batch: images per call.
        device: where to measure.
        seconds: of processor time, after which no further model is begun.

    Returns:
        the measured models in order; empty if the method does not fit plain vision transformers.
    """
    found: list[Rung] = []
    start = time.process_time()
    for width, side in RUNGS:
        if found and (found[-1].speedup >= CLEAR or time.process_time() - start > seconds):
            break
        shape: dict[str, Any] = dict(embed_dim=width, depth=4, num_heads=width // 32, patch_size=16, image_size=side, num_classes=10)
        plain = create_model("sparse_prune_pico", **shape).to(device).eval()
        changed = copy.deepcopy(plain)
        try:
            apply(changed, _ready(method, plain), quiet=True)
        except UsageError:
            return found
        image = example_image(plain, batch)
        with torch.inference_mode():
            times = paired(
                {"before": partial(plain, image), "after": partial(changed, image)}, rounds=ROUNDS, device=device, least_seconds=SECONDS
            )
        ratios = [b / a for b, a in zip(times["before"], times["after"], strict=True)]
        found.append(Rung(width, (side // 16) ** 2 + 1, statistics.median(ratios)))
    return found


def _ready(method: Method, model: torch.nn.Module) -> Method:
    """Return a method that can be applied without data: calibrated on two random images, with the quickest search."""
    names = {field.name for field in dataclasses.fields(method)}
    if "calibration" not in names:
        return method
    quick: dict[str, Any] = {"calibration": example_image(model, 2), "search": "minmax", "images": 2, "mean_bits": None}
    return dataclasses.replace(method, **{k: v for k, v in quick.items() if k in names})


def verdict(method: Method, rungs: list[Rung]) -> str:
    """Return in words from which size a method pays on this machine, with the measured ratios."""
    if not rungs:
        return f"From which size {method.slug} pays was not measured: it does not fit the plain vision transformers that are timed for it."
    measured = f"plain ViTs of four blocks, by width: {', '.join(map(str, rungs))}"
    last = rungs[-1]
    if last.speedup >= CLEAR:
        return f"On this machine {method.slug} pays from a width of about {last.width} at {last.tokens} tokens ({measured})."
    return (
        f"On this machine {method.slug} made none of the timed models faster, up to a width of {last.width} at {last.tokens} tokens "
        f"({measured}); it may still save memory and disk space."
    )
