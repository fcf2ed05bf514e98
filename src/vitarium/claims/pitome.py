"""Claim: merging that protects isolated tokens loses less accuracy than merging by similarity alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitarium.anatomy import Attended, Tokens
from vitarium.catalog.applying import apply
from vitarium.claims import Comparison, Measured, claim
from vitarium.claims.small_vit import accuracy, small_vit
from vitarium.efficiency.tokens.pitome import PiToMe, energy_matching
from vitarium.efficiency.tokens.reducer import Reducer
from vitarium.ops.merging import Merge, bipartite_matching, rows

SEEDS, RATIOS = 3, (0.9, 0.8, 0.7)


@dataclass(frozen=True)
class Matched(Reducer):
    """A baseline that removes the same number of tokens in each block as PiToMe, by another matching."""

    keep: float = 0.9
    chance: bool = field(default=False)

    def reduce(self, tokens: Tokens, attended: Attended, block: int, depth: int) -> None:
        image = tokens.count - tokens.prefix
        metric = attended.k.mean(dim=1)
        merge = bipartite_matching(torch.rand_like(metric) if self.chance else metric, int(image - image * self.keep), prefix=tokens.prefix)
        if merge is not None:
            tokens.merge(merge)


Matched.slug, Matched.kind = "pitome", "reduce"


@claim("pitome", says="at equal token counts, energy-protected merging loses less than ToMe's, and both less than chance", minutes=2)
def compare() -> list[Comparison]:
    """Accuracy off the shelf of a small ViT (16 patches of digits), mean of keep 0.9, 0.8 and 0.7 in every block, a value a seed; ToMe and
    random pairs remove as many tokens in each block. Then, without a network, the distance between the spectra of token graphs before and
    after four rounds at 0.85: where one cluster dominates (the paper's setting), and where clusters are evenly graded, where the advantage
    is known to reverse. Refuted if ToMe is better in the first two, or no better than chance."""
    found: dict[str, list[float]] = {"PiToMe": [], "ToMe": [], "chance": []}
    for seed in range(SEEDS):
        base = small_vit(seed, steps=600)
        torch.manual_seed(seed)
        for label in found:
            methods = [PiToMe(keep=k) if label == "PiToMe" else Matched(keep=k, chance=label == "chance") for k in RATIOS]
            found[label].append(sum(accuracy(_with(base, m)) for m in methods) / len(methods))
    pitome, tome, chance = (Measured(label, values, "%") for label, values in found.items())
    one, graded = (40, 6, 5, 5, 4, 4), (30, 18, 10, 6)
    return [
        Comparison("PiToMe over ToMe", pitome, tome),
        Comparison("ToMe over chance", tome, chance),
        Comparison("spectrum kept, one dominant cluster", _spectra(one, protect=True), _spectra(one, protect=False)),
        Comparison("its limit: ToMe keeps graded clusters", _spectra(graded, protect=False), _spectra(graded, protect=True)),
    ]


def _with(model: nn.Module, method: Reducer) -> nn.Module:
    return apply(copy.deepcopy(model), method, quiet=True)


def _spectra(clusters: tuple[int, ...], *, protect: bool) -> Measured:
    """Return minus the distance of the normalised Laplacian's sorted eigenvalues before and after merging 64 to 34 tokens, 20 seeds."""
    distances = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(len(clusters), 16, generator=generator)
        x = torch.cat([c + 0.3 * torch.randn(n, 16, generator=generator) for c, n in zip(centres, clusters, strict=True)])
        x = x[torch.randperm(len(x), generator=generator)][None]
        merged, size, source = x, None, torch.arange(64)[None]
        for _ in range(4):
            merge = _matching(merged, protect)
            merged, size = merge.average(merged, size)
            source = merge.assignment().gather(1, source)
        distances.append(-float((_eigenvalues(_weights(x)[0]) - _eigenvalues(_lifted(_weights(x)[0], source[0]))).abs().sum()))
    kind = "protected" if protect else "ToMe"
    return Measured(f"{kind}, clusters {'/'.join(map(str, clusters))}", distances, "minus distance")


def _matching(x: Tensor, protect: bool) -> Merge:
    count = x.shape[1]
    merge = energy_matching(x, 0.85, 0.75) if protect else bipartite_matching(x, int(count - count * 0.85))
    if merge is None:
        raise ValueError(f"{count} tokens leave nothing to merge")
    return merge


def _weights(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x, dim=-1)
    return (unit @ unit.transpose(1, 2)).clamp(min=0)


def _lifted(weights: Tensor, source: Tensor) -> Tensor:
    """Return the graph of the merged tokens lifted to the original ones: weights averaged within groups."""
    member = torch.nn.functional.one_hot(source).float()
    mean = member / member.sum(0)
    return rows((mean.T @ weights @ mean)[None], source[None])[0][:, source]


def _eigenvalues(weights: Tensor) -> Tensor:
    scale = weights.sum(1).rsqrt()
    laplacian = torch.eye(len(weights)) - scale[:, None] * weights * scale
    return torch.linalg.eigvalsh(laplacian.double())
