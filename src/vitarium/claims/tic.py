"""Claim: sliding windows need no position encodings, so that other image sizes do little harm; shifts and means add accuracy."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch

from vitarium.catalog import create_model
from vitarium.claims import Comparison, Measured, claim
from vitarium.data import ImageData, open_data
from vitarium.training import ClassificationLearner, evaluate, fit, load_recipe

SEEDS, STEPS, SIDE = 3, 600, 32
SIDES = (24, 32, 48, 64)
TOY: dict[str, Any] = dict(dims=(24, 48), depths=(1, 1), mlp_ratio=2, stem_strides=(2, 2))
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "TiC": ("tic_pico", TOY),
    "TiC without shifts and means": ("tic_pico", TOY | dict(directions=0, pools=())),
    "ViT": ("timm/vit_pico", dict(patch_size=8, dynamic_img_size=True)),
}


def trained(arm: str, seed: int, data: ImageData) -> Any:
    """Train a model at 32x32."""
    recipe = load_recipe("pico", [f"seed={seed}", f"budget.steps={STEPS}", "eval_every=1.0", "mixing.mixup=0", f"image_size={SIDE}"])
    name, options = ARMS[arm]
    torch.manual_seed(seed)
    model = create_model(name, num_classes=len(data.classes), image_size=SIDE, **options)
    with tempfile.TemporaryDirectory() as folder:
        learner = ClassificationLearner.create(model, data, recipe)
        fit(learner, data, recipe, folder)
    return learner.eval_model()


def accuracies(model: Any, data: ImageData) -> dict[int, float]:
    """Return the accuracies on the held-out images at each of SIDES, in percent."""
    found = {}
    for side in SIDES:
        model.preprocessing = replace(model.preprocessing, image_size=side)
        found[side] = 100 * evaluate(model, data.val)["accuracy"]
    return found


@claim("tic", says="other image sizes than in training harm TiC less than a ViT with positions; shifts and means add accuracy", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32, then shown at 24, 48 and 64 pixels to the same weights: the change of accuracy counts. TiC of two blocks with
    windows of 3x3 on maps of 8x8 and 4x4, against a plain ViT of 16 patches with learned positions, which are interpolated, and at 32x32
    against itself without shifts and means. The same steps, recipe and seeds. Refuted where TiC loses more than the ViT from 32 to 64 or on
    average of the other sizes, or where shifts and means do not add accuracy. (Whether two marks far apart have the same colour, which no
    window of 3x3 sees, was learned by neither TiC in 300 steps, one seed.)"""
    data = open_data("digits")
    rows = {arm: [accuracies(trained(arm, seed, data), data) for seed in range(SEEDS)] for arm in ARMS}
    others = [side for side in SIDES if side != SIDE]
    ours, plain, vit = (
        (
            Measured(f"{arm}, from 32 to 64", [row[64] - row[SIDE] for row in rows[arm]], "%"),
            Measured(f"{arm}, mean change", [sum(row[side] - row[SIDE] for side in others) / len(others) for row in rows[arm]], "%"),
            Measured(arm, [row[SIDE] for row in rows[arm]], "%"),
        )
        for arm in ARMS
    )
    return [
        Comparison("change of accuracy from 32x32 to 64x64, over the ViT's", ours[0], vit[0]),
        Comparison("mean change to 24, 48 and 64, over the ViT's", ours[1], vit[1]),
        Comparison("with over without shifts and means", ours[2], plain[2]),
    ]
