"""Claim: window and grid attention together are better than either twice, at equal parameters and MACs."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("maxvit", says="block and grid attention together beat two of either at equal cost", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16: 8x8 tokens, then 4x4, in windows and grids of 2, so that one block's window does not see the map. Parameters and
    MACs are equal to the last; the same steps, recipe and seeds. Refuted where both together are not better by a point than either."""
    common: dict[str, Any] = dict(image_size=16, steps=300, seeds=3, overrides={"mixing.mixup": 0})
    both = Arm("window, then grid", "maxvit_pico", options={"window_size": 2}, **common)
    windows = replace(both, label="windows twice", options={"window_size": 2, "partitions": ["window", "window"]})
    grids = replace(both, label="grids twice", options={"window_size": 2, "partitions": ["grid", "grid"]})
    return [Comparison("over windows twice", both, windows, at_least=1.0), Comparison("over grids twice", both, grids, at_least=1.0)]
