"""Claim: tokens of several scales beat tokens of one, and alternating near and far attention beats near attention alone."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("crossformer", says="cross-scale tokens beat patches of one size, and far attention helps near attention", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32, tokens at stride 2: 16x16 of them in groups of 4, then 8x8. The same model with patches of one size (and merging by
    one kernel), and with every block near; the same steps, recipe and seeds. The patches of one size save parameters, as in the paper's
    own comparison. Refuted where several scales are not better by a point, or far attention is worse than none by more than 0.3 points."""
    common: dict[str, Any] = dict(image_size=32, steps=300, seeds=3, overrides={"mixing.mixup": 0})
    options = dict(group_sizes=(4, 4), intervals=(4, 2))
    full = Arm("CrossFormer", "crossformer_pico", options=options, **common)
    single = replace(full, label="one scale", options=options | {"kernels": [2], "merge_kernels": [2]})
    near = replace(full, label="near alone", options=options | {"intervals": [1, 1]})
    return [Comparison("over one scale", full, single, at_least=1.0), Comparison("over near attention alone", full, near, at_least=-0.3)]
