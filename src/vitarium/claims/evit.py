"""Claim: the tokens that the class token attends to are the important ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitarium.anatomy import Attended, Tokens
from vitarium.catalog import create_model
from vitarium.catalog.applying import apply
from vitarium.catalog.probe import macs_of
from vitarium.claims import Comparison, Measured, claim
from vitarium.claims.small_vit import accuracy, small_vit, trained
from vitarium.efficiency.tokens.evit import EViT

SEEDS, BLOCKS = 3, (1, 2)


@dataclass(frozen=True)
class AnyTokens(EViT):
    """Baseline that keeps the same number of tokens, chosen at random."""

    def _score(self, tokens: Tokens, attended: Attended) -> Tensor:
        return torch.rand(len(tokens.x), tokens.count - tokens.prefix)


@claim(
    "evit", says="half of the tokens, chosen by class attention, cost less than three points, and a choice by chance costs more", minutes=3
)
def compare() -> list[Comparison]:
    """A small ViT (16 patches of digits) is trained once a seed; copies of it are fine-tuned for as many steps with keep 0.5 at two blocks
    chosen by class attention, with the same number chosen by chance, and without reduction. Fusing and dropping are compared without any
    fine-tuning. MACs of DeiT-S at keep 0.7. Refuted if chance does as well, if the loss exceeds three points, or if fusing loses."""
    tuned: dict[str, list[float]] = {"class attention": [], "chance": [], "all tokens": []}
    raw: dict[str, list[float]] = {"fused": [], "dropped": []}
    for seed in range(SEEDS):
        base = small_vit(seed, steps=600)
        arms = {"class attention": EViT(keep=0.5, blocks=BLOCKS), "chance": AnyTokens(keep=0.5, blocks=BLOCKS)}
        for label in tuned:
            start = _with(base, arms[label]) if label in arms else base
            tuned[label].append(accuracy(trained(start, seed, steps=150, lr=1e-3)))
        for label in raw:
            raw[label].append(accuracy(_with(base, EViT(keep=0.5, blocks=BLOCKS, fuse=label == "fused"))))
    chosen = Measured("class attention, fine-tuned", tuned["class attention"], "%")
    return [
        Comparison("class attention over chance", chosen, Measured("chance, fine-tuned", tuned["chance"], "%")),
        Comparison(
            "within three points of all tokens", chosen, Measured("all tokens, fine-tuned", tuned["all tokens"], "%"), at_least=-3.0
        ),
        Comparison("fusing over dropping, as trained", Measured("fused", raw["fused"], "%"), Measured("dropped", raw["dropped"], "%")),
        Comparison("DeiT-S at keep 0.7 skips a third", Measured("MACs of DeiT-S over those at 0.7", [_saved()], "x"), at_least=1.5),
    ]


def _with(model: nn.Module, method: EViT) -> nn.Module:
    return apply(copy.deepcopy(model), method, quiet=True)


def _saved() -> float:
    with torch.device("meta"):
        model = create_model("timm/deit_small_patch16_224")
        image = torch.empty(1, 3, 224, 224)
    whole = macs_of(model, image)
    return whole / macs_of(apply(model, "evit:keep=0.7", example=image, quiet=True), image)
