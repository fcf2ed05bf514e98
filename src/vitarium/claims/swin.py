"""Claim: shifted windows exchange information between neighbours, at a cost linear in image area."""

from dataclasses import replace

from vitarium.catalog import create_model
from vitarium.claims import Arm, Comparison, Measured, claim
from vitarium.efficiency.profiler import count_macs

VIT = "timm/vit_small_patch16_224"


@claim("swin", says="shifted windows beat resting ones, a position bias beats none, and cost grows linearly with image area", minutes=3)
def compare() -> list[Comparison]:
    """Digits of 4x4 tokens, four blocks on windows of 2x2 without merging, so that only the shift carries anything from window to window;
    the same model with resting windows, and without bias tables. MACs of Swin-T and of a plain ViT-S at 224 and 448 pixels. Refuted if the
    shift gains less than three points, if the bias loses, or if Swin's MACs grow faster than the area."""
    options = dict(embed_dim=48, depths=(4,), num_heads=(3,))
    plain = {"mixing.mixup": 0}  # learns faster
    swin = Arm("shifted, with bias", "swin_pico", options=options, steps=700, seeds=5, overrides=plain)
    return [
        Comparison(
            "moving over resting windows", swin, replace(swin, label="not shifted", options=options | {"shifted": False}), at_least=3.0
        ),
        Comparison("bias over no bias", swin, replace(swin, label="no bias", options=options | {"position_bias": False})),
        Comparison("MACs grow as the area", Measured("4 / growth of Swin-T's MACs", [4 / _growth("swin_tiny")], "x"), at_least=0.99),
        Comparison("a ViT's MACs grow faster", Measured("growth of ViT-S's MACs / 4", [_growth(VIT) / 4], "x"), at_least=1.05),
    ]


def _growth(name: str) -> float:
    """Return the MACs at 448 pixels over the MACs at 224."""
    import torch

    with torch.device("meta"):
        return count_macs(create_model(name, image_size=448), 448) / count_macs(create_model(name, image_size=224), 224)
