"""Claim: cross-attention of class tokens to the other branch beats two ViTs with averaged predictions."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("crossvit", says="cross-attention between two patch sizes beats averaging the two branches' answers", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16, patches of 2 and of 4 pixels, with fusion and without it (8 % fewer MACs); the same steps, recipe and seeds. Refuted
    where fusion is not better by a point."""
    common: dict[str, Any] = dict(image_size=16, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    fused = Arm("fusion", "crossvit_pico", **common)
    return [Comparison("with over without fusion", fused, replace(fused, label="mean of two ViTs", options={"fuse": False}), at_least=1.0)]
