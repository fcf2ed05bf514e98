"""Claim: near and coarse keys in one softmax beat either alone, and the gated unit beats an MLP of its size."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("transnext", says="neighbours and a pooled grid in one softmax beat either alone, the convolutional gate a plain MLP", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16, 8x8 tokens with 2x2 coarse ones, in both stages aggregated attention. The same model with one kind of keys, and with
    an MLP of as many parameters; the same steps, recipe and seeds. Refuted where both kinds are worse than one alone by more than 0.3
    points, or the gated unit is not better than the MLP by half a point."""
    common: dict[str, Any] = dict(image_size=16, steps=300, seeds=3, overrides={"mixing.mixup": 0})
    options: dict[str, Any] = dict(pool_ratios=(4, 2))
    full = Arm("both", "transnext_pico", options=options, **common)
    near = replace(full, label="neighbours alone", options=options | {"paths": ["local"]})
    coarse = replace(full, label="coarse alone", options=options | {"paths": ["pooled"]})
    plain = replace(full, label="plain MLP", options=options | {"conv_glu": False})
    return [
        Comparison("over neighbours alone", full, near, at_least=-0.3),
        Comparison("over coarse keys alone", full, coarse, at_least=-0.3),
        Comparison("gated unit over MLP", full, plain, at_least=0.5),
    ]
