"""Claim: both parts of the large kernel attention help: the dilated convolution and the multiplication."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("van", says="the reach of the dilated kernel and the product with its output each help", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32 under a stem of stride 2: 16x16 cells, of which the 23-wide kernel reaches all and the 5-wide one does not. The same
    model without the dilated convolution (one tap instead of 7x7), with the attention map added in place of multiplied, and behind a
    sigmoid; the same steps, recipe and seeds. Refuted where the full model is not better by 2 points than without reach, or is worse by
    more than 0.5 points than with an addition."""
    common: dict[str, Any] = dict(image_size=32, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    options = dict(dims=(16, 32), mlp_ratios=(2, 2))
    full = Arm("LKA", "van_pico", options=options, **common)
    return [
        Comparison(
            "with over without the dilated kernel", full, replace(full, label="5x5", options=options | {"kernel_size": 3}), at_least=2.0
        ),
        Comparison("product over sum", full, replace(full, label="sum", options=options | {"gate": "add"}), at_least=-0.5),
        Comparison(
            "without over with a sigmoid", full, replace(full, label="sigmoid", options=options | {"gate": "sigmoid"}), at_least=-0.5
        ),
    ]
