"""Claim: windows that move let neighbours talk, and their cost is linear in image area."""

from vitarium.catalog import create_model
from vitarium.claims import Arm, Comparison, Measured, claim
from vitarium.efficiency.profiler import count_macs

VIT = "timm/vit_small_patch16_224"


@claim(
    "swin",
    says="shifted windows beat resting ones, a relative position bias beats none, and cost grows linearly with image area",
    minutes=3,
)
def compare() -> list[Comparison]:
    """Scenes of 64x64 whose class says whether two small marks, up to three windows apart, have one shape; the same Swin with and without
    shift, no merging in between. Digits with and without bias tables. MACs of Swin-T and of a plain ViT-S at 224 and 448 pixels. Refuted if
    the shift gains less than three points, if the bias loses, or if Swin's MACs more than quadruple with the area."""
    marks = dict(
        model="swin_pico",
        options=dict(embed_dim=32, depths=(4,), num_heads=(2,), window_size=4, patch_size=4),
        data="scenes:task=same_shape",
        image_size=64,
        steps=600,
        seeds=3,
    )
    still = marks | {"options": marks["options"] | {"shifted": False}}
    digits = dict(model="swin_pico", steps=300, seeds=3)
    return [
        Comparison("moving over resting windows", Arm("shifted", **marks), Arm("not shifted", **still), at_least=3.0),
        Comparison("bias over no bias", Arm("bias", **digits), Arm("no bias", options={"position_bias": False}, **digits)),
        Comparison("MACs grow as the area", Measured("4 / growth of Swin-T's MACs", [4 / _growth("swin_tiny")], "x"), at_least=0.99),
        Comparison("a ViT's MACs grow faster", Measured("growth of ViT-S's MACs / 4", [_growth(VIT) / 4], "x"), at_least=1.05),
    ]


def _growth(name: str) -> float:
    """MACs at 448 pixels over MACs at 224."""
    import torch

    with torch.device("meta"):
        return count_macs(create_model(name, image_size=448), 448) / count_macs(create_model(name, image_size=224), 224)
