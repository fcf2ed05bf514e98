"""Claim: convolutional tokens and projections beat a plain ViT of the same size, without position encodings."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("cvt", says="better than a plain ViT of equal size at equal steps, and coarse keys and values cost little", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16. CvT of two stages (8x8 and 4x4 tokens) against timm's plain ViT of 4x4 patches whose parameters differ by less than
    5 %; and against itself with keys and values at full resolution. The same steps, recipe and seeds. Refuted where CvT is not better than
    the ViT by 2 points, or coarse keys cost more than a point."""
    common: dict[str, Any] = dict(image_size=16, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    ours = Arm("CvT, 109 k parameters", "cvt_pico", **common)
    vit = replace(
        ours, label="ViT, 107 k parameters", model="timm/vit_pico", options=dict(embed_dim=48, depth=4, num_heads=4, mlp_ratio=3.5)
    )
    whole = replace(ours, label="keys at full resolution", options={"kv_stride": 1})
    return [Comparison("over a plain ViT", ours, vit, at_least=2.0), Comparison("coarse over full keys", ours, whole, at_least=-1.0)]
