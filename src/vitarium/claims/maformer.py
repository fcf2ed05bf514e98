"""Claim: local tokens that attend to global ones beat either stream alone and the sum of both."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("maformer", says="fusing fine and coarse features by attention beats either alone and their sum", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16: 8x8 tokens in windows of 2, so that a window alone sees little, and 16 global tokens. The same model with windows
    alone, global tokens alone, and both added; the same steps, recipe and seeds. Refuted where attention is not better than either stream
    by a point, or is worse than the sum."""
    common: dict[str, Any] = dict(image_size=16, steps=350, seeds=3, overrides={"mixing.mixup": 0})
    cross = Arm("cross", "maformer_pico", options=dict(window_size=2), **common)
    others = {kind: replace(cross, label=kind, options=dict(window_size=2, fusion=kind)) for kind in ("local", "global", "add")}
    return [
        Comparison("cross over windows alone", cross, others["local"], at_least=1.0),
        Comparison("cross over global tokens alone", cross, others["global"], at_least=1.0),
        Comparison("cross over the sum", cross, others["add"]),
    ]
