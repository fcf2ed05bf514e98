"""Claim: prompts with semantic proxies find images of unseen classes as well as full fine-tuning does, and better than plain proxies."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from vitarium.catalog import create_model
from vitarium.catalog.saving import load, save
from vitarium.claims import Comparison, Measured, claim
from vitarium.data.image_set import ImageData, Samples
from vitarium.data.retrieval import Groups
from vitarium.perception.retrieval.embedding import embeddings_of
from vitarium.perception.retrieval.scores import retrieval_scores
from vitarium.perception.vpt_proxies import VPTProxiesLearner
from vitarium.training import ClassificationLearner, fit, load_recipe

SEEDS, SIDE = 3, 16
KNOWN, LEARNED, SEARCHED = range(50), range(50, 75), range(75, 100)
"""Classes (after shuffling) for pretraining, tuning and search."""
PRETRAINING, TUNING = 800, 200
"""Steps."""
ARMS = {
    "prompts, semantic proxies": dict(tune="prompts", proxies="semantic"),
    "prompts, plain proxies": dict(tune="prompts", proxies="plain"),
    "all weights, plain proxies": dict(tune="all", proxies="plain"),
}


class Numbers(Samples):
    """16x16 images of two-digit numbers: scikit-learn's handwritten digits (8x8) side by side, light on dark grey, with some noise.

    Args:
        classes: which of the hundred numbers, after shuffling.
        count: images per class.
        seed: random seed of the selected digits and of everything else.
        part: 0 or 1, the half of the handwritten digits that is used.
    """

    def __init__(self, classes: range, count: int, seed: int, part: int = 0):
        rng = np.random.default_rng((seed, classes.start))
        numbers = np.random.default_rng(7).permutation(100)[classes]
        pools = [handwriting()[0][handwriting()[1] == digit][part::2] for digit in range(10)]
        targets = [i for i in range(len(classes)) for _ in range(count)]
        images = [self._draw([pools[d] for d in divmod(int(numbers[t]), 10)], rng) for t in targets]
        super().__init__(range(len(images)), targets, read=images.__getitem__, name=lambda i: f"number {targets[i]} #{i}")

    @staticmethod
    def _draw(pools: list[NDArray[Any]], rng: np.random.Generator) -> Image.Image:
        ink = np.zeros((SIDE, SIDE))
        for place, pool in enumerate(pools):
            ink[4:12, 8 * place : 8 * place + 8] = pool[rng.integers(len(pool))] / 16
        ink = rng.uniform(0.0, 0.2) + rng.uniform(0.6, 0.8) * ink + rng.normal(0, 0.03, ink.shape)
        return Image.fromarray((255 * ink).clip(0, 255).astype(np.uint8)).convert("RGB")


@functools.cache
def handwriting() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images (1797, 8, 8) from 0 to 16, and their digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target


def pretrained(seed: int, folder: Path) -> Path:
    """Train a small ViT to classify 50 numbers, and write it to a file."""
    torch.manual_seed(seed)
    model = create_model("timm/vit_pico", num_classes=len(KNOWN), image_size=SIDE)
    train, val = (Numbers(KNOWN, count, start + seed) for count, start in ((40, 100), (3, 200)))
    data = ImageData("numbers", train, val, list(map(str, KNOWN)), SIDE)
    changes = [f"seed={seed}", f"budget.steps={PRETRAINING}", "batch_size=64", "eval_every=1.0"]
    recipe = load_recipe("pico", changes)
    fit(ClassificationLearner.create(model, data, recipe), data, recipe, folder / "pretraining")
    save(model, folder / "base.safetensors")
    return folder / "base.safetensors"


def recall(model: nn.Module, images: Numbers) -> float:
    """Return recall@1 in percent."""
    prepare: Any = model.preprocessing
    image = torch.stack([prepare(images[i][0]) for i in range(len(images))])
    with torch.inference_mode():
        vectors = torch.cat([embeddings_of(model.eval(), some) for some in image.split(256)])
    return 100 * retrieval_scores(vectors, torch.tensor(images.targets))["recall_at_1"]


def tuned(base: Path, arm: str, data: ImageData, seed: int, folder: Path, lr: float) -> VPTProxiesLearner:
    """Tune the base on numbers."""
    changes = [f"objective.{key}={value}" for key, value in ARMS[arm].items()]
    changes += [f"seed={seed}", f"optimizer.lr={lr}", f"budget.steps={TUNING}", "eval_every=1.0", "batch_size=12"]
    recipe = load_recipe("vpt_proxies_pico", changes)
    learner = VPTProxiesLearner.create(str(base), data, recipe)
    fit(learner, data, recipe, folder / f"{arm} {lr}")
    return learner


@claim(
    "vpt_proxies",
    says="prompts with semantic proxies find unseen classes as well as full fine-tuning, and better than prompts with plain proxies",
    minutes=3,
)
def compare() -> list[Comparison]:
    """A ViT of 16 patches learns to classify 50 two-digit numbers (800 steps). Then it is tuned on 25 other numbers, 30 images each,
    for 200 steps of 12 groups of 4 images; recall@1 is measured on the 25 numbers that are left, 20 images each, of other digits. Each
    way of tuning has the better of two learning rates (on the first seed). Full fine-tuning has plain proxies, and prompts as well. Share:
    of the embedding model's weights that are kept frozen. Refuted where semantic proxies do no better than plain ones or the frozen
    features, stay more than a point behind full fine-tuning, or less than 90 % is frozen."""
    found: dict[str, list[float]] = {arm: [] for arm in ("frozen features", *ARMS)}
    frozen: list[float] = []
    rates: dict[str, float] = {}
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = pretrained(seed, folder)
            searched = Numbers(SEARCHED, 20, 400 + seed, part=1)
            learned = Groups(Numbers(LEARNED, 30, 300 + seed))  # type: ignore[arg-type]
            data = ImageData("numbers", learned, searched, list(map(str, LEARNED)), SIDE)  # type: ignore[arg-type]
            found["frozen features"].append(recall(load(base), searched))
            for arm in ARMS:
                tries = [rates[arm]] if arm in rates else [3e-3, 1e-2]
                learners = {lr: tuned(base, arm, data, seed, folder, lr) for lr in tries}
                values = {lr: recall(one.eval_model(), searched) for lr, one in learners.items()}
                rates[arm] = max(values, key=lambda lr: values[lr])
                found[arm].append(values[rates[arm]])
                if ARMS[arm]["tune"] == "prompts" and len(frozen) < seed + 1:
                    parameters = list(learners[rates[arm]].eval_model().parameters())
                    frozen.append(100 * sum(p.numel() for p in parameters if not p.requires_grad) / sum(p.numel() for p in parameters))
    semantic, *others = (Measured(f"recall@1, {arm}", found[arm], "%") for arm in (*ARMS, "frozen features"))
    plain, everything, features = others
    return [
        Comparison("semantic over plain proxies", semantic, plain),
        Comparison("no more than a point behind full fine-tuning", semantic, everything, at_least=-1.0),
        Comparison("over the frozen features", semantic, features),
        Comparison("at least 90 % of the weights are frozen", Measured("frozen", frozen, "%"), None, at_least=90.0),
    ]
