"""Claim: one to four channels of queries and keys are nearly as good as all, and attention and the local module each help."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("s2aformer", says="squeezed queries and keys cost little accuracy; attention and the local module help", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16, two stages. Four channels a head in queries and keys against all of them (12), against no attention, against no
    LIM, and against means in place of the strided convolution; the same steps, recipe and seeds. Refuted where four channels lose more
    than 1.5 points, or where attention does not gain 2, or where LIM or the convolution do harm."""
    common: dict[str, Any] = dict(image_size=16, steps=300, seeds=3, overrides={"mixing.mixup": 0})
    strip = Arm("4 channels", "s2aformer_pico", options=dict(qk_dim=4), **common)
    other = lambda label, **options: replace(strip, label=label, options=dict(strip.options) | options)
    return [
        Comparison("4 channels over all", strip, other("all channels", qk_dim=None), at_least=-1.5),
        Comparison("over no attention", strip, other("no attention", attention=False), at_least=2.0),
        Comparison("with over without LIM", strip, other("no LIM", lim=False)),
        Comparison("convolution over means", strip, other("means", pool=True)),
    ]
