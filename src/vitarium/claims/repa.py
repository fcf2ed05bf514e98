"""Claim: aligning a denoiser's early block with a good encoder's features improves its features and its images at equal steps."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog import create_model
from vitarium.claims import Comparison, Measured, claim
from vitarium.claims.small_vit import digits
from vitarium.data.loader import Loader
from vitarium.generation.diffusion import Encoder, hidden_tokens, process_of
from vitarium.generation.frechet import frechet_distance, moments
from vitarium.generation.repa import REPALearner, train_encoder
from vitarium.training import fit, load_recipe

SEEDS, STEPS, SAMPLES, TIME = 3, 300, 360, 0.3


@dataclass(frozen=True)
class Shuffled(Encoder):
    """Placebo encoder: the features of another image of the batch."""

    def map(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return super().map(image.roll(1, 0), grid)


@claim("repa", says="with aligned representations a denoiser sees more and makes better images after the same steps", minutes=3)
def compare() -> list[Comparison]:
    """Digits in pixels, a SiT of 3 blocks on 16 tokens, 300 steps, 3 seeds an arm: plain, aligned to a small ConvNeXt that was trained on
    the same digits with their labels (coefficient 0.5, after block 2), and aligned to what it says of shuffled images. Measured: a linear
    probe (ridge regression) on the mean token at t = 0.3, after block 2 and after the last; minus the Fréchet distance of 360 samples (25
    Euler steps, no guidance) to the held-out digits, in the pooled features of an independent ResNet. Refuted if the aligned arm is not
    better than the plain one; the placebo must not do as well."""
    teacher = train_encoder("pico", digits(), seed=100, model="convnext_pico")
    judge = train_encoder("pico", digits(), seed=200, model="timm/resnet_pico")
    arms = {"plain": None, "aligned": teacher, "shuffled": Shuffled(teacher.name, teacher.model)}
    found: dict[str, list[tuple[float, float, float]]] = {label: [] for label in arms}
    for seed in range(SEEDS):
        for label, encoder in arms.items():
            model = trained(seed, teacher if encoder is None else encoder, 0.0 if encoder is None else 0.5)
            found[label].append((*probes(model), -distance(model, judge, seed)))
    early, late, samples = (
        {label: Measured(f"{label}, {what}", [row[i] for row in rows], unit) for label, rows in found.items()}
        for i, (what, unit) in enumerate([("block 2", "%"), ("last block", "%"), ("samples", "minus distance")])
    )
    return [
        Comparison("probe after the aligned block", early["aligned"], early["plain"]),
        Comparison("probe after the last block", late["aligned"], late["plain"]),
        Comparison("samples", samples["aligned"], samples["plain"]),
        Comparison("probe: aligned over the placebo", early["aligned"], early["shuffled"]),
    ]


def trained(seed: int, encoder: Encoder, coefficient: float) -> nn.Module:
    """Train an arm and return its averaged weights; arms differ only in the coefficient and the encoder."""
    torch.manual_seed(seed)
    model = create_model("repa_pico", in_chans=1, z_dims=(encoder.dim,))
    changes = [f"budget.steps={STEPS}", f"seed={seed}", f"objective.coefficient={coefficient}", "objective.samples=0", "eval_every=1.0"]
    recipe = load_recipe("repa_pico", [*changes, "ema.decay=0.99", "objective.guidance=1.0"])
    learner = REPALearner(model, recipe.settings_of(REPALearner), encoders=[encoder])
    with tempfile.TemporaryDirectory() as folder:
        fit(learner, digits(), recipe, Path(folder))
    return copy.deepcopy(learner.eval_model()).eval()


def probes(model: Any) -> tuple[float, float]:
    """Return the accuracy, in percent, of a ridge regression on the mean noisy token after block 2 and after the last block."""
    blocks = [f"blocks.{i}" for i in (1, len(model.blocks) - 1)]
    features: list[dict[str, Tensor]] = []
    targets: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for part in (digits().train, digits().val):
        batch = next(Loader(part, model.preprocessing, batch_size=len(part)).epoch(0))
        image, t = batch["image"], torch.full((len(batch["image"]),), TIME)
        noisy = process_of(model).way.mix(image, torch.randn(image.shape, generator=generator), t)  # type: ignore[union-attr]
        with torch.no_grad(), hidden_tokens(model, blocks) as hidden:
            model(noisy, t)
        features.append({name: tokens.mean(1).double() for name, tokens in hidden.items()})
        targets.append(batch["target"])
    return tuple(_ridge(features[0][b], targets[0], features[1][b], targets[1]) for b in blocks)  # type: ignore[return-value]


def _ridge(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> float:
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_val = ((v - mean) / deviation for v in (x, x_val))
    answers = torch.nn.functional.one_hot(y).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ (answers - answers.mean(0)))
    return 100 * float(((x_val @ weights + answers.mean(0)).argmax(1) == y_val).double().mean())


def distance(model: Any, judge: Encoder, seed: int) -> float:
    """Return the Fréchet distance of samples to the held-out digits, in an independent classifier's features."""
    real = next(Loader(digits().val, model.preprocessing, batch_size=SAMPLES).epoch(0))["image"] / 2 + 0.5
    made = model.generate(torch.arange(SAMPLES) % 10, seed=seed)
    return float(frechet_distance(*moments(judge.pooled(made)), *moments(judge.pooled(real))))
