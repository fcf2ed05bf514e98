"""Claim: attention between sub-patches ("words") inside a patch beats a ViT of the same cost."""

from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("tnt", says="a transformer inside each patch beats a wider ViT of the same cost", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16 in 16 patches of 16 words, three blocks of 64 channels, against three of a plain ViT of 72 channels with MLPs of
    four times its width, which takes as many multiplications (within 5 %); the same steps, recipe and seeds. Refuted where TNT is not
    better by 2 points."""
    common: dict[str, Any] = dict(image_size=16, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    vit = Arm("ViT", "convit_pico", options=dict(local_up_to_layer=0, depth=3, embed_dim=72), **common)
    return [Comparison("over a ViT of the same cost", Arm("TNT", "tnt_pico", **common), vit, at_least=2.0)]
