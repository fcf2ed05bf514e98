"""Claim: attention between low frequencies is about as good as attention between all positions."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("dct_histo", says="attention between a quarter of the coefficients matches attention between all places", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32, maps of 16x16 and 8x8, of which the 8x8 and 4x4 lowest frequencies attend; against attention between all places, and
    against none. The same widths, steps, recipe and seeds. Refuted where it is worse than attention between places by more than 3 points,
    or than no attention by more than 1."""
    common: dict[str, Any] = dict(image_size=32, steps=300, seeds=3, overrides={"mixing.mixup": 0})
    options: dict[str, Any] = dict(dims=(16, 32), keeps=(8, 4))
    dct = Arm("frequencies", "dct_histo_pico", options=options, **common)
    return [
        Comparison("over places", dct, replace(dct, label="places", options=options | {"attention": "spatial"}), at_least=-3.0),
        Comparison("over no attention", dct, replace(dct, label="none", options=options | {"attention": "none"}), at_least=-1.0),
    ]
