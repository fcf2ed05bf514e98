"""Claim: spectral layers work best before attention layers."""

from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("spectformer", says="spectral layers first beat attention alone and attention first at equal size", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32 under patches of 4: 64 tokens of 32 channels, three blocks by their letters (S spectral, A attention); the same
    steps, recipe and seeds. Refuted where SAA is not better than AAA or than AAS by 2 points. At so short a budget SSS may be the best of
    all: what SAA loses to it is reported, and may not be more than 15 points."""
    common: dict[str, Any] = dict(image_size=32, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    options = dict(embed_dim=32, num_heads=2)
    arm = lambda mixers: Arm(mixers, "spectformer_pico", options=options | {"mixers": mixers}, **common)
    first = arm("SAA")
    return [
        Comparison("spectral first over attention alone", first, arm("AAA"), at_least=2.0),
        Comparison("spectral first over attention first", first, arm("AAS"), at_least=2.0),
        Comparison(
            "spectral first over spectral alone", first, replace(first, label="SSS", options=options | {"mixers": "SSS"}), at_least=-15.0
        ),
    ]
