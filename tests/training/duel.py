"""A learner of two players that trains in milliseconds; everything is picklable, for the tests with several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.tiny import SIDE, tiny_data, tiny_recipe, weights
from vitarium.catalog import Preprocessing
from vitarium.training import Learner, fit
from vitarium.training.players import Player

RECIPE = ("mixing={}", "ema={decay: 0.9}", "clip={norm: 1.0}", "accumulate=1", "num_workers=0")


class Maker(nn.Module):
    """Noise (B, 6) -> images (B, 3, 8, 8)."""

    def __init__(self, *, norm: bool = False):
        super().__init__()
        self.preprocessing = Preprocessing(SIDE, crop_pct=1.0)
        self.stem = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.head = nn.Linear(16, 3 * SIDE * SIDE)

    def forward(self, noise: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(noise)).relu()).unflatten(1, (3, SIDE, SIDE))


class Judge(nn.Module):
    """Images (B, 3, 8, 8) -> scores (B,)."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.score = nn.Linear(32, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.score(self.drop(self.norm(self.conv(image)).tanh().flatten(1))).squeeze(1)


class Duel(Learner):
    """A generator against a discriminator.

    Args:
        third: whether a third player takes its turn between the two.
        every: of the generator.
        shared: whether the generator's turns may change the discriminator's buffers.
    """

    def __init__(self, *, norm: bool = False, dropout: float = 0.0, third: bool = False, every: int = 1, shared: bool = False):
        torch.manual_seed(0)
        super().__init__(Maker(norm=norm))
        self.discriminator = Judge(norm=norm, dropout=dropout)
        self.every, self.shared = every, shared
        self.third = nn.Linear(6, 1) if third else None
        self.seen: list[dict[str, Any]] = []
        self.step = -1

    def players(self):
        chosen = {"discriminator": Player(self.discriminator, lazy={"r1": 3})}
        if self.third is not None:
            chosen["third"] = Player(self.third)
        buffers = (self.discriminator,) if self.shared else ()
        return {**chosen, "generator": Player(self.model, every=self.every, ema=True, buffers=buffers)}

    def before_step(self, step, total_steps):
        self.step = step

    def loss(self, batch, player):
        noise = self.noise(batch, 6)
        self.seen.append({"step": self.step, "player": player, "noise": noise, "index": batch["index"], "loose": torch.rand(1)})
        if player == "third":
            return {"loss": self.third(noise).square().mean()}
        fake = self.model(noise)
        if player == "generator":
            return {"loss": F.softplus(-self.discriminator(fake)).mean()}
        real, made = self.discriminator(batch["image"]), self.discriminator(fake.detach())
        return {"loss": F.softplus(-real).mean() + F.softplus(made).mean(), "real": real.mean()}

    def regularize(self, batch, player, name):
        self.seen.append({"step": self.step, "player": player, "name": name})
        image = batch["image"].detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.discriminator(image).sum(), image, create_graph=True)
        return slope.square().sum((1, 2, 3)).mean()

    def metrics(self):
        from torchmetrics import MeanMetric

        return nn.ModuleDict({"level": MeanMetric()})

    def evaluate_batch(self, model, batch, metrics):
        generator = torch.Generator().manual_seed(0)
        metrics["level"].update(model(torch.randn(len(batch["index"]), 6, generator=generator)).mean())

    def summary(self, metrics):
        return {"level": metrics["level"].compute().item()}


def duel(folder: Path, *assignments: str, learner: Duel | None = None, devices: int = 1, **options: Any):
    """Train one; the result, the weights of everything, and the learner."""
    learner = learner or Duel(**options)
    recipe = tiny_recipe(*RECIPE, *assignments)
    result = fit(learner, tiny_data(), recipe, folder, devices=devices, accelerator="cpu")
    return result, weights(learner), learner
