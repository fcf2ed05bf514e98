"""Claim: unsupervised dependency trees group the parts of objects, and tokens that receive little can be pruned."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vitarium import anatomy
from vitarium.catalog import create_model
from vitarium.claims import Comparison, Measured, claim
from vitarium.claims.experiment import TO_THE_END
from vitarium.data.image_set import ImageData, Samples
from vitarium.explanation.simple import attention_of_blocks
from vitarium.training import ClassificationLearner, evaluate, fit, load_recipe

SEEDS, SIDE, PATCH, TESTED = 3, 64, 8, 200
RED, BLUE, GREEN, WHITE = (230, 60, 60), (70, 110, 240), (60, 200, 80), (240, 240, 240)
KINDS = {"red-blue": (RED, BLUE), "blue-red": (BLUE, RED), "red-green": (RED, GREEN), "green-red": (GREEN, RED)}
"""Kind -> colours of body and limbs. Kinds share one set of colours and differ in which of them the body has."""
SIZES: dict[str, Any] = dict(patch_size=PATCH, embed_dim=48, depth=4, num_heads=4)


class Creatures(Samples):
    """64x64 images of two or three creatures of one kind, each a body with head and limbs, bent and turned at random.

    Args:
        count: how many; image i shows the kind i modulo 4.
        seed: random seed of the drawing.
    """

    def __init__(self, count: int, seed: int):
        targets = [i % len(KINDS) for i in range(count)]
        super().__init__(range(count), targets, read=functools.cache(lambda i: self.drawn(i)[0]), name=self._name_of)
        self.seed = seed

    def drawn(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Return an image and a map (64, 64) of creature numbers, 0 for the background."""
        rng = np.random.default_rng((self.seed, index))
        noise = rng.normal(110, 15, (SIDE // 4, SIDE // 4)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        number = Image.new("L", (SIDE, SIDE))
        pens = ImageDraw.Draw(image), ImageDraw.Draw(number)
        quarters = rng.permutation(4)[: int(rng.integers(2, 4))]
        for i, quarter in enumerate(quarters.tolist(), start=1):
            x, y = (16 + 32 * (quarter % 2) + rng.uniform(-2, 2), 16 + 32 * (quarter // 2) + rng.uniform(-2, 2))
            _draw_creature(pens, rng, list(KINDS.values())[self.targets[index]], x, y, i)
        pixels = np.asarray(image, dtype=np.float32) + rng.normal(0, 8, (SIDE, SIDE, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), np.asarray(number)

    def things(self, index: int) -> NDArray[np.int64]:
        """Return the creature of each patch, (64,): the most frequent one, 0 where less than a third of the patch shows any."""
        cells = self.drawn(index)[1].reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).swapaxes(1, 2).reshape(-1, PATCH * PATCH)
        shares = np.stack([(cells == i).mean(1) for i in range(1, 4)], 1)
        return np.where(shares.max(1) >= 1 / 3, shares.argmax(1) + 1, 0)

    def _name_of(self, index: int) -> str:
        return f"{list(KINDS)[self.targets[index]]} #{index}"


def _draw_creature(
    pens: tuple[ImageDraw.ImageDraw, ImageDraw.ImageDraw], rng: np.random.Generator, kind: tuple, x: float, y: float, number: int
) -> None:
    body, limb = kind
    turn, size, limbs = rng.uniform(0, 2 * math.pi), rng.uniform(6.5, 8), int(rng.integers(3, 6))
    for i in range(limbs):
        angle = turn + 2 * math.pi * i / limbs + rng.uniform(-0.3, 0.3)
        end = (x + 2 * size * math.cos(angle), y + 2 * size * math.sin(angle))
        pens[0].line([(x, y), end], fill=limb, width=5)
        pens[1].line([(x, y), end], fill=number, width=5)
    away = turn + math.pi / limbs
    head = (x + 1.3 * size * math.cos(away), y + 1.3 * size * math.sin(away))
    for (middle_x, middle_y), radius, colour in (((x, y), size, body), (head, 4, WHITE)):
        corners = (middle_x - radius, middle_y - radius, middle_x + radius, middle_y + radius)
        pens[0].ellipse(corners, fill=colour)
        pens[1].ellipse(corners, fill=number)


def trained(model: nn.Module, images: ImageData, seed: int, steps: int, lr: float = 3e-3) -> nn.Module:
    """Train on the class alone."""
    common = [f"seed={seed}", "eval_every=1.0", "batch_size=32", "mixing.mixup=0", f"budget.steps={steps}", f"optimizer.lr={lr}"]
    recipe = load_recipe("pico", [*TO_THE_END, *common])
    learner = ClassificationLearner.create(model, images, recipe)
    with tempfile.TemporaryDirectory() as folder:
        fit(learner, images, recipe, Path(folder))
    return learner.eval_model().eval()


def purity(mask: Tensor, things: NDArray[np.int64]) -> tuple[float, float]:
    """Return the share of children on creatures whose parent is on the same one, in percent, and that of a random parent.

    Args:
        mask: (B, N, N), [parent, child].
        things: (B, N).
    """
    parent = mask.diagonal_scatter(mask.new_full(mask.shape[:2], -1), dim1=1, dim2=2).argmax(1).numpy()
    child = things > 0
    same = np.take_along_axis(things, parent, 1) == things
    chance = ((things[:, :, None] == things[:, None]).sum(2) - 1) / (things.shape[1] - 1)
    return 100 * float(same[child].mean()), 100 * float(chance[child].mean())


def by_chance(received: Tensor, messages: Tensor) -> Tensor:
    """Baseline that prunes the same number of tokens at random."""
    return torch.rand_like(received)


def pruned(whole: nn.Module, choice: str) -> nn.Module:
    """Return a copy that prunes half of the tokens in the second of four blocks."""
    model = create_model("dependencyvit_pico", num_classes=len(KINDS), image_size=SIDE, prune_blocks=(1,), prune_share=0.5, **SIZES)
    model.load_state_dict(whole.state_dict())
    if choice == "chance":
        model.blocks[1].score = by_chance  # type: ignore[union-attr, index]
    return model


@claim(
    "dependencyvit",
    says="a patch's parent lies on the same thing, more often than by chance or in a ViT; half of the tokens, those that receive least, "
    "cost at most two points",
    minutes=3,
)
def compare() -> list[Comparison]:
    """Images of two or three creatures of one kind among four, body, head and limbs in different colours, 64 patches. The kind alone is
    learned, in 220 steps, by a DependencyViT and by a ViT of the same size. Purity over 200 fresh images: of the patches on a creature,
    how many have the patch that they send most to (in the ViT: look at most), mean over blocks and heads, on the same creature; beside the
    expectation of a parent by chance. Then half of the tokens leave in the second of four blocks: as trained, those that received least
    against any; and after 60 more steps with them gone, against all tokens. Refuted where purity is not 10 points above chance or is below
    the ViT's, or where pruning by received mass costs more than by chance or more than two points."""
    pure: dict[str, list[float]] = {"ours": [], "vit": [], "chance": []}
    right: dict[str, list[float]] = {"all": [], "received": [], "chance": [], "tuned": []}
    for seed in range(SEEDS):
        images = ImageData("creatures", Creatures(4000, 1000 + seed), Creatures(400, 2000 + seed), list(KINDS), SIDE)
        common: dict[str, Any] = dict(num_classes=len(KINDS), image_size=SIDE, **SIZES)
        torch.manual_seed(seed)
        model = trained(create_model("dependencyvit_pico", **common), images, seed, 220)
        vit = trained(create_model("timm/vit_pico", **common), images, seed, 220)
        for name, value in purities(model, vit, seed).items():
            pure[name].append(value)
        right["all"].append(accuracy(model, images))
        for choice in ("received", "chance"):
            right[choice].append(accuracy(pruned(model, choice).eval(), images))
        right["tuned"].append(accuracy(trained(pruned(model, "received"), images, seed, 60, lr=1e-3), images))
    parent = Measured("parent on the same creature, DependencyViT", pure["ours"], "%")
    by_mass, by_luck = (Measured(f"half of the tokens, by {what}", right[what], "%") for what in ("received", "chance"))
    return [
        Comparison("purity over chance", parent, Measured("parent by chance", pure["chance"], "%"), at_least=10.0),
        Comparison("purity over a ViT's attention", parent, Measured("ViT", pure["vit"], "%"), at_least=0.0),
        Comparison("who received least over any, as trained", by_mass, by_luck, at_least=0.0),
        Comparison(
            "within two points of all tokens",
            Measured("half of the tokens, by received, learned on", right["tuned"], "%"),
            Measured("all tokens", right["all"], "%"),
            at_least=-2.0,
        ),
    ]


@torch.no_grad()
def purities(model: nn.Module, vit: nn.Module, seed: int) -> dict[str, float]:
    """Return the purity of DependencyViT, of the ViT, and of random parents."""
    shown = Creatures(TESTED, 3000 + seed)
    things = np.stack([shown.things(i) for i in range(TESTED)])
    image, same = (torch.stack([m.preprocessing(shown[i][0]) for i in range(TESTED)]) for m in (model, vit))  # type: ignore[operator]
    ours, chance = purity(model(image, return_dependency=True)[1].mean_mask(), things)
    looks_at = torch.stack(attention_of_blocks(vit, same)[1]).mean(0)
    prefix = anatomy.of(vit).prefix
    theirs, _ = purity(looks_at[:, prefix:, prefix:].transpose(1, 2), things)
    return {"ours": ours, "vit": theirs, "chance": chance}


def accuracy(model: nn.Module, images: ImageData) -> float:
    """Return the accuracy on the held-out images, in percent."""
    return 100 * evaluate(model, images.val)["accuracy"]
