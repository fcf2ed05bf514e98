"""Claim: local affinity in shallow layers and global attention in deep ones beat either alone, at fewer MACs than attention throughout."""

from typing import Any

from vitarium.catalog import create_model
from vitarium.claims import Arm, Comparison, Measured, claim
from vitarium.efficiency.profiler import count_macs

TOY: dict[str, Any] = dict(dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), head_dim=32, patch_size=2)


@claim(
    "uniformer",
    says="convolution first and attention last is no worse than attention throughout, cheaper, and no worse than convolution throughout",
    minutes=3,
)
def compare() -> list[Comparison]:
    """Digits at 16x16 and a toy of four stages in the types LLGG, GGGG and LLLL under one budget. Refuted if GGGG is more than half a point
    better or needs no more MACs, or if LLLL is better. That convolution alone fails where distant places must be compared is not tested:
    LLGG did not learn to compare two marks (scenes:task=same_shape, one seed) in 300 steps."""

    def arm(mixers: str) -> Arm:
        return Arm(mixers, "uniformer_pico", options=TOY | {"mixers": mixers}, steps=300, seeds=3)

    return [
        Comparison("LLGG over GGGG", arm("LLGG"), arm("GGGG"), at_least=-0.5),
        Comparison("MACs of GGGG over LLGG", Measured("ratio", [_macs("GGGG") / _macs("LLGG")], "x"), at_least=1.05),
        Comparison("LLGG over LLLL", arm("LLGG"), arm("LLLL"), at_least=0.0),
    ]


def _macs(mixers: str) -> int:
    """Return the MACs of one image of the toy model."""
    import torch

    with torch.device("meta"):
        return count_macs(create_model("uniformer_pico", **TOY, mixers=mixers).eval(), 16)
