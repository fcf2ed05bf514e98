"""Claim: local affinity in shallow layers and global attention in deep ones beat either alone, at fewer MACs than attention throughout."""

from typing import Any

from vitarium.catalog import create_model
from vitarium.claims import Arm, Comparison, Measured, claim
from vitarium.efficiency.profiler import count_macs

TOY: dict[str, Any] = dict(dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), head_dim=32, patch_size=2)
SIDE = 32


@claim(
    "uniformer",
    says="convolution first and attention last is no worse than attention throughout, cheaper, and better than convolution throughout",
    minutes=3,
)
def compare() -> list[Comparison]:
    """A four-stage toy at 32x32 in the types LLGG, GGGG and LLLL under one budget, on scenes: the kind of the nearest thing, and whether
    two marks far apart have the same shape. Refuted if GGGG is more than half a point better, costs less, or LLLL does as well on marks."""
    budget: dict[str, Any] = dict(model="uniformer_pico", image_size=SIDE, steps=300, seeds=3)
    things = budget | {"data": "scenes:length=2000"}
    marks = budget | {"data": "scenes:task=same_shape,length=2000"}

    def arm(mixers: str, setting: dict[str, Any]) -> Arm:
        return Arm(mixers, **setting, options=TOY | {"mixers": mixers})

    saved = _macs("GGGG") / _macs("LLGG")
    return [
        Comparison("LLGG over GGGG, kinds of things", arm("LLGG", things), arm("GGGG", things), at_least=-0.5),
        Comparison("MACs of GGGG over LLGG", Measured("ratio", [saved], "x"), at_least=1.0),
        Comparison("LLGG over LLLL, far marks", arm("LLGG", marks), arm("LLLL", marks), at_least=0.0),
    ]


def _macs(mixers: str) -> int:
    """Of one image of the toy."""
    import torch

    with torch.device("meta"):
        return count_macs(create_model("uniformer_pico", image_size=SIDE, **TOY, mixers=mixers).eval(), SIDE)
