"""The small vision transformer that the claims of token reductions share: digits, 16 patches and a class token, four blocks."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from vitarium.catalog import create_model
from vitarium.data import open_data
from vitarium.data.image_set import ImageData
from vitarium.training import ClassificationLearner, evaluate, fit, load_recipe


def digits() -> ImageData:
    """Return real handwriting, 16x16 pixels."""
    return open_data("digits")


def small_vit(seed: int, *, steps: int) -> nn.Module:
    """Train a small ViT from scratch on digits by the pico recipe."""
    torch.manual_seed(seed)
    model = create_model("timm/vit_pico", num_classes=10, image_size=16, patch_size=4, depth=4)
    return trained(model, seed, steps=steps)


def trained(model: nn.Module, seed: int, *, steps: int, lr: float = 3e-3) -> nn.Module:
    """Return a copy that was trained for `steps` more steps."""
    recipe = load_recipe("pico", [f"budget.steps={steps}", f"seed={seed}", "eval_every=1.0", f"optimizer.lr={lr}"])
    learner = ClassificationLearner.create(copy.deepcopy(model), digits(), recipe)
    with tempfile.TemporaryDirectory() as folder:
        fit(learner, digits(), recipe, Path(folder))
    return learner.eval_model().eval()


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the held-out fifth, in percent."""
    return 100 * evaluate(model, digits().val)["accuracy"]
