"""Claim: a higher order of interaction helps, and gnConv is no worse than a depth-wise convolution, in one skeleton at equal size."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("hornet", says="third order beats first, and gnConv matches ConvNeXt's block in the same skeleton", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32, two stages of two blocks, stem of stride 4; the widths are such that parameters differ by less than 4 % (order 3:
    88 k, order 1: 85 k, ConvNeXt: 86 k). The same steps, recipe and seeds. Refuted where order 3 is not better than order 1 by a point,
    or worse than ConvNeXt's block by more than 0.3 points."""
    common: dict[str, Any] = dict(image_size=32, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    third = Arm("order 3", "hornet_pico", options=dict(dims=(24, 48), orders=(3, 3), patch_size=4), **common)
    first = replace(third, label="order 1", options=dict(dims=(25, 50), orders=(1, 1), patch_size=4))
    convnext = replace(third, label="ConvNeXt", model="convnext_pico", options=dict(dims=(29, 58), patch_size=4))
    return [
        Comparison("order 3 over order 1", third, first, at_least=1.0),
        Comparison("over ConvNeXt's block", third, convnext, at_least=-0.3),
    ]
