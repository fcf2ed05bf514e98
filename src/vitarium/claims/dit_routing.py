"""Claim: learned routes beat random ones of equal rates, are as good as a plain pyramid of equal cost, and follow the objects."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vitarium.catalog import create_model
from vitarium.claims import Comparison, Measured, claim
from vitarium.data.image_set import ImageData, Samples
from vitarium.data.scenes.render import around, to_uint8
from vitarium.data.scenes.shapes import SHAPES
from vitarium.efficiency.profiler import count_macs
from vitarium.training import Learner, evaluate, find_learner, fit, load_recipe

SEEDS, STEPS, SIDE, BUDGET = 3, 220, 64, 0.5
KINDS = ("square", "ring", "triangle", "cross")
DIMS = (16, 32, 64, 96)
GRID: dict[str, Any] = dict(
    dims=DIMS, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 6), sr_ratios=(8, 4, 2, 1), mlp_ratios=(2, 2, 2, 2), columns=2, patch_size=4
)


class Drawn(Samples):
    """64x64 images on a noisy ground, each with one white shape, small or large. Class: its kind.

    Args:
        count: number of images.
        seed: random seed of the images.

    Attributes:
        masks: (count, 64, 64) bool, where the shapes are.
    """

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        targets = [i % len(KINDS) for i in range(count)]
        self.images: list[Image.Image] = []
        masks = []
        for i, target in enumerate(targets):
            image = (rng.uniform(40, 90) + rng.normal(0, 12, (SIDE, SIDE, 3))).astype(np.float32)
            radius = rng.uniform(5, 7) if i // len(KINDS) % 2 else rng.uniform(14, 20)
            x, y = rng.uniform(radius, SIDE - radius, 2)
            window, u, v = around(x, y, radius, rng.uniform(-0.3, 0.3), SIDE)
            cover = np.clip(0.5 - SHAPES[KINDS[target]](u, v) * np.float32(radius), 0, 1)
            image[window] += (220 - image[window]) * cover[..., None]
            mask = np.zeros((SIDE, SIDE), bool)
            mask[window] = cover > 0.5
            self.images.append(Image.fromarray(to_uint8(image)))
            masks.append(mask)
        self.masks: NDArray[np.bool_] = np.stack(masks)
        super().__init__(range(count), targets, read=self.images.__getitem__, name=lambda i: f"drawing #{i}")


class RandomGate(nn.Module):
    """Random gate: a token takes the edge with a fixed probability, independent of its content."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor) -> Tensor:
        on = torch.rand(y.shape[:2], device=y.device) < self.rate
        return torch.stack([~on, on], 2).to(y.dtype) * 1e4  # too large to be changed by noise


def trained(model: Any, objective: str, seed: int, data: ImageData) -> tuple[Any, float]:
    """Train a model; return it and its accuracy in percent."""
    changes = [f"seed={seed}", f"budget.steps={STEPS}", "eval_every=1.0", "mixing.mixup=0", f"objective={{name: {objective}}}"]
    recipe = load_recipe("dit_routing_pico", changes)
    learner: Learner = find_learner(objective).create(model, data, recipe)
    with tempfile.TemporaryDirectory() as folder:
        fit(learner, data, recipe, folder)
    torch.manual_seed(seed)
    return learner.eval_model(), 100 * evaluate(learner, data.val)["accuracy"]


def routed(seed: int) -> Any:
    """Return an untrained grid."""
    torch.manual_seed(seed)
    return create_model("dit_routing_pico", num_classes=len(KINDS), image_size=SIDE, budget=BUDGET, **GRID)


def random_like(model: Any, images: Tensor, seed: int) -> Any:
    """Return an untrained grid with random gates, each open as often as a trained model's."""
    routes, twin = model.routes(images), routed(seed)
    for gates, way in ((twin.gates_row, routes.row), (twin.gates_col, routes.column)):
        for (i, j), taken in way.items():
            gates[i][j] = RandomGate(taken.mean().item())
    return twin


def static_of(macs: float, seed: int) -> nn.Module:
    """Return a plain PVTv2 with one block per scale, of the width whose cost is nearest."""

    def build(width: int) -> nn.Module:
        dims = tuple(dim * width // 16 for dim in DIMS)
        sizes: dict[str, Any] = dict(embed_dims=dims, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 6), mlp_ratios=(2, 2, 2, 2))
        return create_model("timm/pvt_v2_b0", num_classes=len(KINDS), image_size=SIDE, **sizes)

    with torch.device("meta"):
        costs = {width: count_macs(build(width), SIDE) for width in range(8, 41, 2)}
    torch.manual_seed(seed)
    return build(min(costs, key=lambda width: abs(costs[width] - macs)))


def depths(model: Any, images: Tensor, masks: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the mean number of blocks over the shapes' pixels and over the others."""
    depth, shape = model.eval().depth_map(images), torch.from_numpy(masks)
    return depth[shape].mean().item(), depth[~shape].mean().item()


@claim(
    "dit_routing",
    says="learned routes beat random ones of the same rates, reach a plain pyramid of the same cost, and work where the thing is",
    minutes=3,
)
def compare() -> list[Comparison]:
    """Kinds of a small or large shape on 64x64; four scales, three columns of nodes with single blocks between. Learned routes at a budget
    of half the cost; the same grid with random gates that are as often on, edge by edge; and a plain PVTv2 of one block a scale whose width
    gives the same multiply-accumulates. The same steps, recipe and seeds. Refuted where random routes are as good, where the pyramid is
    better by more than a point, or where tokens of the shape go through no more blocks than those of the ground."""
    found: dict[str, list[float]] = {name: [] for name in ("learned", "random", "static", "shape", "ground")}
    for seed in range(SEEDS):
        train, val = Drawn(1600, 2 * seed), Drawn(400, 2 * seed + 1)
        data = ImageData("drawings", train, val, list(KINDS), SIDE)
        model, accuracy = trained(routed(seed), "dit_routing", seed, data)
        images = torch.stack([model.preprocessing(image) for image in val.images[:200]])
        found["learned"].append(accuracy)
        found["random"].append(trained(random_like(model, images, seed), "classification", seed, data)[1])
        found["static"].append(trained(static_of(model.macs(images).mean().item(), seed), "classification", seed, data)[1])
        for name, depth in zip(("shape", "ground"), depths(model, images, val.masks[:200]), strict=True):
            found[name].append(depth)
    learned, random, static = (
        Measured(label, found[name], "%")
        for label, name in (("learned routes", "learned"), ("random routes", "random"), ("plain pyramid", "static"))
    )
    shape, ground = (Measured(name, found[name], "blocks") for name in ("shape", "ground"))
    return [
        Comparison("learned over random routes", learned, random),
        Comparison("no more than a point behind the pyramid", learned, static, at_least=-1.0),
        Comparison("blocks over the shape and over the ground", shape, ground),
    ]
