"""Claim: dense residuals preserve features that a chain of Swin blocks loses, and restore better at equal size."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.claims import Comparison, Measured, claim
from vitarium.data import Subset, open_data
from vitarium.data.loader import Loader, generators_kept, seed_generators
from vitarium.generation.drct import DRCT, Grid, WindowAttention
from vitarium.generation.restoration.learner import RestorationLearner
from vitarium.generation.restoration.samples import PairTransform
from vitarium.nn import Mlp
from vitarium.training import evaluate

SEEDS, STEPS, BATCH, CROP, LR, MEASURED = 3, 90, 4, 24, 5e-4, 3
FRAME: dict[str, Any] = dict(scale=2, growth=8, depths=(1, 1), window_size=8, num_feat=32, drop_path_rate=0.0)
DENSE: dict[str, Any] = dict(embed_dim=32, num_heads=2)
PLAIN: dict[str, Any] = dict(embed_dim=45, num_heads=3)
"""Channels and heads; with these both networks have as many parameters (the plain one 4 % more)."""


class PlainBlock(nn.Module):
    """Swin block on tokens of C channels, in the order of the unshifted grid."""

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        here = x if grid.order is None else x.index_select(0, grid.order)
        parts = [
            self.attn(self.norm1(here[first:last]).view(-1, height * width, here.shape[1]), self.attn.bias(height, width, x.dtype))
            for height, width, first, last in grid.pieces(len(x))
        ]
        here = here + torch.cat([part.flatten(0, 1) for part in parts])
        here = here + self.mlp(self.norm2(here))
        return here if grid.inverse is None else here.index_select(0, grid.inverse)


class PlainGroup(nn.Module):
    """SwinIR's group with a 1x1 last convolution: a chain of five Swin blocks of one width, and a residual around them."""

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(dim, num_heads, window_size) for _ in range(5))
        self.last = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rest: Grid, moved: Grid) -> Tensor:
        y = x
        for i, block in enumerate(self.blocks):
            y = block(y, moved if i % 2 else rest)
        return x + self.last(y)


def network(dense: bool) -> DRCT:
    """Return DRCT, or its frame around plain groups."""
    if dense:
        return DRCT(**DENSE, **FRAME)
    net = DRCT(**PLAIN, **FRAME | {"depths": ()})
    net.groups = nn.ModuleList(PlainGroup(PLAIN["embed_dim"], PLAIN["num_heads"], FRAME["window_size"]) for _ in FRAME["depths"])
    for part in net.groups.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
    return net


@claim(
    "drct",
    says="dense residuals restore better than a plain chain of Swin blocks of as many parameters, and keep features alive",
    minutes=3,
)
def compare() -> list[Comparison]:
    """Photographs are made half as large; two networks of 0.24 M parameters and equal depth double them: DRCT with two groups, and the
    same frame around plain groups of Swin blocks, wider to have as many parameters. Both start as an interpolation and are trained alike.
    A seed decides weights, crops and which photographs are held out. PSNR on luma of held-out squares, beside bicubic enlargement; and
    the standard deviation of features after the last group over that after the first. Refuted if the plain chain is better, if one of
    them does not beat bicubic, or if DRCT's features fade more."""
    psnr: dict[str, list[float]] = {"DRCT": [], "plain chain": [], "bicubic": []}
    kept: dict[str, list[float]] = {"DRCT": [], "plain chain": []}
    for seed in range(SEEDS):
        data = open_data("photos", task="pairs", seed=seed)
        held_out = Subset(data.val, range(0, len(data.val), max(1, len(data.val) // MEASURED)))
        for label in kept:
            net = trained(network_of(label, seed), data.train, seed)
            values = evaluate(RestorationLearner(net), held_out)
            psnr[label].append(values["psnr"])
            kept[label].append(intensity(net, held_out))
        psnr["bicubic"].append(values["bicubic_psnr"])
    dense, plain, bicubic = (Measured(label, values, "dB") for label, values in psnr.items())
    still = [Measured(f"last over first group, {label}", values) for label, values in kept.items()]
    return [
        Comparison("DRCT over the plain chain", dense, plain),
        Comparison("DRCT over bicubic", dense, bicubic),
        Comparison("the plain chain over bicubic", plain, bicubic),
        Comparison("DRCT's features fade less", still[0], still[1]),
    ]


def network_of(label: str, seed: int) -> DRCT:
    """Return a network with the random weights of a seed."""
    with generators_kept():
        seed_generators(seed)
        net = network(label == "DRCT")
        net.start_as_interpolation()
    return net


def trained(net: DRCT, images: Any, seed: int) -> DRCT:
    """Train by Adam on the mean absolute error, with a short warm-up and half a cosine from `LR`; return the moving average."""
    loader = Loader(images, PairTransform(2, crop=CROP, flip=0.5), batch_size=BATCH, seed=seed, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, betas=(0.9, 0.99))
    batches = (batch for epoch in range(STEPS) for batch in loader.epoch(epoch))
    learner, average = RestorationLearner(net), copy.deepcopy(net)
    for step, batch in zip(range(STEPS), batches, strict=False):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        learner.loss(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, weight in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(weight, max(0.05, 1 / (step + 1)))
    return average.eval()


@torch.no_grad()
def intensity(net: DRCT, images: Any) -> float:
    """Return the standard deviation of the map after the last group over that after the first, on one held-out square."""
    low, _ = PairTransform(2)(*images[0])
    maps = net.group_maps(low[None].float() / 255)
    return float(maps[-1].std() / maps[0].std())
