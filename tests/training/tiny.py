"""A data set, a model and a recipe that train in milliseconds; everything is picklable, for the tests with several processes.

As a program (`torchrun -m tests.training.tiny FOLDER STRATEGY [KEY=VALUE ...]`) it trains them in two processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitarium.catalog import Preprocessing
from vitarium.data import ImageData
from vitarium.training.recipe import Recipe
from vitarium.training.settings import check, override

SIDE = 8


class Quadrants:
    """Noise with one bright quadrant of four: the class is which one."""

    def __init__(self, count: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.targets = [int(t) for t in rng.integers(0, 4, count)]
        noise = rng.integers(0, 160, (count, SIDE, SIDE, 3), dtype=np.uint8)
        for picture, target in zip(noise, self.targets, strict=True):
            row, column = divmod(target, 2)
            picture[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 40
        self.pictures = noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pictures[index]), self.targets[index]

    def describe(self, index: int) -> str:
        return f"quadrants/{index}.png"


def tiny_data(train: int = 96, val: int = 33) -> ImageData:
    """A number of held-out pictures that no batch size divides."""
    return ImageData("quadrants", Quadrants(train), Quadrants(val, seed=1), ["a", "b", "c", "d"], SIDE)


class TinyNet(nn.Module):
    """(B, 3, 8, 8) -> (B, 4). With dropout, so that a resumed run must find its random numbers again."""

    def __init__(self, *, dropout: float = 0.1, norm: bool = False):
        super().__init__()
        self.num_classes = 4
        self.preprocessing = Preprocessing(SIDE, crop_pct=1.0)
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(32, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(image)).relu().flatten(1)))


def tiny_net(**arguments: Any) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(**arguments)


def tiny_recipe(*assignments: str) -> Recipe:
    """A hundred milliseconds of everything: mixing, augmentation, moving average, accumulation, clipping."""
    values: dict[str, Any] = {
        "budget": {"steps": 24},
        "batch_size": 8,
        "accumulate": 2,
        "optimizer": {"lr": 1e-2},
        "mixing": {"mixup": 0.4, "cutmix": 1.0, "probability": 0.7},
        "augment": {"flip": 0.5, "pad_crop": 1},
        "ema": {"decay": 0.9},
        "clip": {"norm": 1.0},
        "eval_every": "5 steps",
        "log_every": 3,
    }
    if any(text.startswith("objective=") for text in assignments):
        del values["mixing"]  # a setting of classification
    return check(Recipe, override(values, list(assignments)), "the test's recipe")


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a state dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def main() -> None:
    from vitarium.training import ClassificationLearner, fit

    folder, strategy, *assignments = sys.argv[1:]
    recipe = tiny_recipe(*assignments)
    learner = ClassificationLearner.create(tiny_net(dropout=0.0), tiny_data(), recipe)
    fit(learner, tiny_data(), recipe, folder, devices=2, strategy=strategy, accelerator="cpu")
    if os.environ["RANK"] == "0":
        torch.save(weights(learner.eval_model()), Path(folder) / "weights.pt")


if __name__ == "__main__":
    main()
