"""Claim: soft splits beat separate patches, and a deep and narrow transformer beats a shallow and wide one."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("t2t_vit", says="overlapping tokens that talk beat patches that are cut, and deep-narrow beats shallow-wide", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32 in 16 tokens, trained on 30 % of them. Two soft splits with an attention layer between them and four blocks (170 k
    parameters) against cut patches of 8 and a fifth block (169 k); then, behind the same tokens, six blocks of 48 channels (145 k) against
    two of 84 (157 k). The same steps, recipe and seeds. Refuted where soft splits are not better by 2 points, or deep-narrow is worse."""
    common: dict[str, Any] = dict(image_size=32, steps=300, seeds=3, val_fraction=0.7, overrides={"mixing.mixup": 0})
    splits: dict[str, Any] = dict(splits=((7, 4), (3, 2)))
    soft = Arm("T2T", "t2t_vit_pico", options=splits, **common)
    deep = replace(soft, label="deep-narrow", options=splits | dict(depth=6, embed_dim=48))
    return [
        Comparison(
            "soft splits over cut patches",
            soft,
            replace(soft, label="patches", options=dict(splits=((8, 8),), depth=5, mlp_ratio=1.75)),
            at_least=2.0,
        ),
        Comparison(
            "deep-narrow over shallow-wide",
            deep,
            replace(deep, label="shallow-wide", options=splits | dict(depth=2, embed_dim=84)),
            at_least=0.0,
        ),
    ]
