"""Claim: next-scale prediction beats raster next-code prediction in quality and time, at equal size and budget."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.claims import Comparison, Measured, claim
from vitarium.claims.small_vit import digits, small_vit

SEEDS, STEPS, TOKENIZER_STEPS, ROUNDS = 3, 400, 250, 5
SIZES: dict[str, Any] = dict(embed_dim=64, depth=3, num_heads=4)


@dataclass(frozen=True)
class Way:
    """One order of generation: a tokenizer, the codes of each step, and the input of a step."""

    tokenizer: Any
    lengths: Sequence[int]
    raster: bool

    def views(self, codes: Sequence[Tensor]) -> Tensor:
        """Return the transformer's input in training: the image up to the previous scale, or the previous code."""
        return self.tokenizer.quantizer.codebook(codes[0][:, :-1]) if self.raster else self.tokenizer.inputs(codes)


@claim("var", says="next-scale prediction makes better images than raster next-code prediction, in fewer and faster steps", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16. Two tokenizers of one architecture and budget, one with maps of 1, 2, 3 and 4 codes a side, one with the 4x4 map
    alone; on each a transformer of equal sizes and steps, that predicts the 4 maps (30 codes) or the 16 codes in raster order.
    Quality: minus the Fréchet distance to held-out digits, in the features of a classifier that neither has seen, sampled without
    guidance or truncation. Time: of sampling with a cache, both ways in turn, batch 1 and 64. Refuted if raster order is as good or
    as fast, or if any scale is predicted no better than by chance."""
    scales, raster = Way(_tokenizer((1, 2, 3, 4)), (1, 4, 9, 16), False), Way(_tokenizer((4,)), (1,) * 16, True)
    features = _features()
    real = features(torch.cat([images for images, _ in _batches(digits().val)]))
    quality: dict[str, list[float]] = {"next scale": [], "raster": []}
    margins, trained = [], []
    for seed in range(SEEDS):
        for (label, values), way in zip(quality.items(), (scales, raster), strict=True):
            model = _trained(way, seed)
            values.append(-_distance(real, features(_sampled(way, model, digits().val.targets * 2, seed))))
            trained.append((way, model))
            if label == "next scale":
                margins.append(math.log(way.tokenizer.vocab_size) - max(_losses(way, model)))
    quick, many = (_speedups(dict(zip(quality, trained[:2], strict=True)), batch) for batch in (1, 64))
    better, worse = (Measured(label, values, "minus Fréchet distance") for label, values in quality.items())
    return [
        Comparison("better images than in raster order", better, worse),
        Comparison("faster than in raster order, one image", Measured("raster / next scale", quick, "x faster"), at_least=1.0),
        Comparison("faster than in raster order, 64 images", Measured("raster / next scale", many, "x faster"), at_least=1.0),
        Comparison("every scale is better than chance", Measured("ln V - worst scale's loss", margins, "nats"), at_least=0.0),
    ]


def _tokenizer(scales: tuple[int, ...]) -> Any:
    """Train a tokenizer by the recipe, with fewer steps."""
    from vitarium.training import find_learner, fit, load_recipe

    images = digits()
    recipe = load_recipe("var_tokenizer_pico", [f"budget.steps={TOKENIZER_STEPS}", "eval_every=1.0", "image_size=16"])
    recipe = recipe.model_copy(update=dict(model_arguments={"scales": list(scales)}))
    unlabelled = type(images)(images.name, images.train, images.val, [], images.image_size)
    learner = find_learner("var_tokenizer").create("var_tokenizer_pico", unlabelled, recipe)
    with tempfile.TemporaryDirectory() as folder:
        fit(learner, unlabelled, recipe, Path(folder))
    return learner.eval_model().eval().requires_grad_(False)


def _batches(images: Any) -> list[tuple[Tensor, Tensor]]:
    """Return images (B, 3, 16, 16) in [0, 1] and classes."""
    from torchvision.transforms.functional import to_tensor

    pairs = [images[i] for i in range(len(images))]
    stacked, labels = torch.stack([to_tensor(image) for image, _ in pairs]), torch.tensor([target for _, target in pairs])
    return list(zip(stacked.split(256), labels.split(256), strict=True))


def _coded(way: Way, images: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return views (N, L - 1, C), codes (N, L) and classes (N,) of a set of images."""
    parts = []
    with torch.no_grad():
        for image, labels in _batches(images):
            codes = way.tokenizer.encode(2 * image - 1)
            parts.append((way.views(codes), torch.cat(codes, 1), labels))
    views, codes, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return views, codes, labels


def _trained(way: Way, seed: int) -> Any:
    """Train a transformer for each order with the same budget: AdamW, half a cosine, 64 images per step, a tenth of them without class."""
    from vitarium.generation.var.transformer import ScaleTransformer

    torch.manual_seed(seed)
    tokenizer = way.tokenizer
    model = ScaleTransformer(way.lengths, tokenizer.code_dim, tokenizer.vocab_size, 10, **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    views, codes, labels = _coded(way, digits().train)
    for _ in range(STEPS):
        chosen = torch.randint(len(labels), (64,))
        shown = labels[chosen].masked_fill(torch.rand(64) < 0.1, 10)
        loss = F.cross_entropy(model(views[chosen], shown).flatten(0, 1), codes[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        rate.step()
    return model.eval()


def _losses(way: Way, model: Any) -> list[float]:
    """Return the held-out cross entropy of each scale, in nats."""
    views, codes, labels = _coded(way, digits().val)
    with torch.no_grad():
        losses = F.cross_entropy(model(views, labels).transpose(1, 2), codes, reduction="none")
    return [part.mean().item() for part in losses.split(list(way.lengths), 1)]


@torch.no_grad()
def _sampled(way: Way, model: Any, classes: Sequence[int], seed: int) -> Tensor:
    """Sample images (B, 3, 16, 16) in [0, 1] of the given classes."""
    from vitarium.generation.var.model import draw
    from vitarium.generation.var.transformer import Steps

    tokenizer, generator = way.tokenizer, torch.Generator().manual_seed(seed)
    steps, codes = Steps(model, torch.tensor(classes)), []
    view = total = None
    for k in range(len(way.lengths)):
        logits = steps.next(view)
        codes.append(draw(logits, torch.rand(logits.shape[:2], generator=generator, dtype=torch.float64)))
        vectors = tokenizer.quantizer.codebook(codes[-1])
        if way.raster:
            view = vectors
        else:
            detail = tokenizer.quantizer.detail(vectors, k)
            total = detail if total is None else total + detail
            view = tokenizer.quantizer.view(total, k + 1) if k + 1 < len(way.lengths) else None
    return (tokenizer.decode([torch.cat(codes, 1)] if way.raster else codes) + 1) / 2


def _features() -> Callable[[Tensor], Tensor]:
    """Return features of images in [0, 1]: a digit classifier's, before its last layer."""
    from vitarium.catalog import preprocessing_of

    judge: Any = small_vit(0, steps=400)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing_of(judge).mean, preprocessing_of(judge).std))

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return judge.forward_head(judge.forward_features((images - mean) / std), pre_logits=True)

    return features


def _distance(real: Tensor, made: Tensor) -> float:
    from vitarium.generation.frechet import frechet_distance, moments

    return float(frechet_distance(*moments(real), *moments(made)))


def _speedups(ways: dict[str, tuple[Way, Any]], batch: int) -> list[float]:
    """Return the ratio of the sampling time in raster order to that by scales, one value per round."""
    from vitarium.efficiency.timing import paired

    calls: dict[str, Callable[[], Any]] = {
        label: functools.partial(_sampled, way, model, [3] * batch, 0) for label, (way, model) in ways.items()
    }
    times = paired(calls, rounds=ROUNDS)
    return [b / a for a, b in zip(times["next scale"], times["raster"], strict=True)]
