"""Claim: initialising attention as a convolution helps a ViT most when data are few."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("convit", says="better than the same ViT with ordinary attention, above all when data are few", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16 in 16 tokens, four blocks of which three are gated, against the same blocks with attention by content alone. On a
    tenth of the images (of which the held-out part is the rest) and on all of them; the same steps, recipe and seeds. Refuted where the
    gain on a tenth is below 2 points."""
    common: dict[str, Any] = dict(image_size=16, seeds=3, overrides={"mixing.mixup": 0})
    few = Arm("ConViT, a tenth", "convit_pico", steps=250, val_fraction=0.9, **common)
    every = Arm("ConViT, all", "convit_pico", steps=500, **common)
    plain = {"local_up_to_layer": 0}
    return [
        Comparison("over a ViT on a tenth of the data", few, replace(few, label="ViT, a tenth", options=plain), at_least=2.0),
        Comparison("over a ViT on all data", every, replace(every, label="ViT, all", options=plain), at_least=0.0),
    ]
