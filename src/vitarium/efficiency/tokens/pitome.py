"""PiToMe: merging of similar tokens in every block, with protection of isolated ones; ToMe, which protects none, is its baseline.

"Accelerating Transformers with Spectrum-Preserving Token Merging" (Tran et al., NeurIPS 2024) after "Token Merging: Your ViT But Faster"
(Bolya et al., ICLR 2023). Both merge between attention and MLP; similarity is the cosine of the keys' mean over heads.

ToMe: tokens at even and odd positions are matched, and the r most similar pairs are replaced by their size-weighted means. Attention
weights a merged token by its size s (log s is added to the logits).

PiToMe: r = floor(T - keep T) of the T image tokens are removed. With K the unit-normalised keys and m the block's margin,

    E_i = mean_j ELU(K_i K_j^T - m)          energy: high in a large cluster of near-duplicates, low for an isolated token

the 2 r tokens of highest energy are candidates, alternately source and destination in the order of energy; each source merges into its
most similar destination. The margin falls with the depth, m_i = margin + (margin_end - margin) i / L. In the first half of the blocks
nothing is protected: all tokens are candidates, and the r most similar pairs merge.

Source: the authors' code (hchautran/PiToMe, its DeiT patch; facebookresearch/ToMe), equal to rounding: PiToMe's attention is not
proportional by default, though the paper's is. Differences: registers and the distillation token are protected too. In a rotary model a
merged token has the position of its destination. Left out: ToMe's k-th and random matching (no published number uses them), and merging in
text encoders, which `energy_matching(text=True)` offers as a function. Cost: one T x T product of head_dim channels per block, for ToMe a
quarter of that.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vitarium.anatomy import Attended, Tokens
from vitarium.catalog.methods import method
from vitarium.catalog.options import Numbers, validated
from vitarium.efficiency.tokens.reducer import Reducer
from vitarium.ops.merging import Merge, bipartite_matching, rows
from vitarium.ops.sorting import descending_order


@method("tome", kind="reduce")
@validated
class ToMe(Reducer):
    """Token merging: the r most similar pairs merge in every block.

    Args:
        r: tokens to remove in each block: a number, or one per block. At most half of the image tokens are removed at once; 0 changes
            nothing. Live.
        keep: share of the tokens, the prefix included, that each block keeps, instead of `r`; None: r. The baseline of PiToMe's tables;
            at most half of the image tokens are removed at once. Live.
        inflection: change of r with the depth, in [-1, 1]: 0 constant; -1 falls from 2 r to 0; 1 rises from 0 to 2 r. Live.
        proportional: weight merged tokens by their sizes in attention; the authors do not for MAE models and in training. Live.
    """

    r: Annotated[int, Field(ge=0)] | Numbers = 8
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    inflection: Annotated[float, Field(ge=-1, le=1)] = 0.0
    proportional: bool = True

    tunable: ClassVar[tuple[str, ...]] = ("r", "keep", "inflection", "proportional")

    @property
    def counts_sizes(self) -> bool:
        return self.proportional

    def amount(self, block: int, depth: int, count: int = 0) -> int:
        """Return the number of tokens to remove in a block that `count` tokens enter."""
        if self.keep is not None:
            return math.floor(count - count * self.keep)
        if isinstance(self.r, tuple):
            return self.r[block] if block < len(self.r) else 0
        least = int(self.r * (1 - self.inflection))
        most = 2 * self.r - least
        return int(least + (most - least) * block / max(depth - 1, 1))

    def reduce(self, tokens: Tokens, attended: Attended, block: int, depth: int) -> None:
        merge = bipartite_matching(attended.k.mean(dim=1), self.amount(block, depth, tokens.count), prefix=tokens.prefix)
        if merge is not None:
            tokens.merge(merge)


@method("pitome", kind="reduce")
@validated
class PiToMe(Reducer):
    """Token merging within large clusters, with protection of isolated tokens.

    Args:
        keep: share of the image tokens that each block keeps, [0.5, 1]; 1 changes nothing. Live.
        margin: similarity from which tokens count as near, at block 0. The authors: 0.75 for DeiT and MAE, 0.9 for augreg ViT, BLIP and
            transformers' CLIP, 0.95 for open_clip. Live.
        margin_end: value towards which it falls with the depth: 0 in those; 0.35 in their BLIP-2 (from 0.75), 0.65 in their BERT (from
            0.9). Live.
        alpha: of the energy's ELU: weight of the tokens that are not near; the authors use 1. Live.
        protect: blocks in which isolated tokens are protected: "late" (second half: the authors' DeiT), "early" (first half: their MAE),
            "all" or "none".
        prune: drop the sources instead of merging them.
        proportional: weight merged tokens by their sizes in attention. Live.
    """

    keep: Annotated[float, Field(ge=0.5, le=1)] = 0.925
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.75
    margin_end: Annotated[float, Field(ge=-1, le=1)] = 0.0
    alpha: Annotated[float, Field(ge=0)] = 1.0
    protect: Literal["late", "early", "all", "none"] = "late"
    prune: bool = False
    proportional: bool = False

    tunable: ClassVar[tuple[str, ...]] = ("keep", "margin", "margin_end", "alpha", "proportional")

    @property
    def counts_sizes(self) -> bool:
        return self.proportional

    @property
    def can_restore(self) -> bool:
        return not self.prune

    def reduce(self, tokens: Tokens, attended: Attended, block: int, depth: int) -> None:
        protect = {"all": True, "none": False, "late": block >= math.ceil(depth / 2), "early": block < math.ceil(depth / 2)}[self.protect]
        margin = self.margin + (self.margin_end - self.margin) * block / depth
        merge = energy_matching(attended.k.mean(dim=1), self.keep, margin, prefix=tokens.prefix, protect=protect, alpha=self.alpha)
        if merge is None:
            return
        if self.prune:
            assignment = merge.assignment().scatter(1, merge.source, -1)
            tokens.move(merge.gather(tokens.x), merge.keep, assignment, None if tokens.size is None else merge.gather(tokens.size))
        else:
            tokens.merge(merge)


def energy(similarity: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """Return the mean over j of ELU(similarity_ij - margin): (B, T, T) -> (B, T)."""
    return F.elu(similarity - margin, alpha=alpha).mean(dim=-1)


def gaussian_energy(similarity: Tensor, margin: float) -> Tensor:
    """Return the energy for text, the mean over j of a normal density of width 1 - margin around similarity 1: (B, T, T) -> (B, T)."""
    sigma = 1 - margin
    return (torch.exp(-(((1 - similarity) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))).mean(dim=-1)


def energy_matching(
    metric: Tensor,
    keep: float,
    margin: float,
    *,
    prefix: int = 0,
    protect: bool = True,
    text: bool = False,
    alpha: float = 1.0,
) -> Merge | None:
    """Choose PiToMe's sources and their destinations.

    Args:
        metric: (B, N, D); no gradient flows through the decision.
        keep: share of the N - prefix image tokens that remain.
        margin: of the energy.
        prefix: tokens at the start that never merge.
        protect: whether only the 2 r tokens of highest energy may merge; if not, the r most similar pairs of all tokens merge.
        text: the variant for text: Gaussian energy; the first half of the candidates merges into the second half.
        alpha: of the energy's ELU, see `energy`; the energy for text has none.

    Returns:
        prefix, then (protected tokens or unmerged sources), then destinations; None if nothing is removed.
    """
    count = metric.shape[1] - prefix
    remove = math.floor(count - count * keep)
    if remove <= 0:
        return None
    with torch.no_grad():
        metric = F.normalize(metric.detach()[:, prefix:], dim=-1, eps=1e-20)
        similarity = metric @ metric.transpose(1, 2)
        order = descending_order(gaussian_energy(similarity, margin) if text else energy(similarity, margin, alpha))
        candidates = order[:, : 2 * remove] if protect or text else order
        half = (slice(0, remove), slice(remove, None)) if text else (slice(0, None, 2), slice(1, None, 2))
        a, b = candidates[:, half[0]], candidates[:, half[1]]
        best, partner = (rows(metric, a) @ rows(metric, b).transpose(1, 2)).max(dim=-1)
        if protect or text:
            source, rest, target = a, order[:, 2 * remove :], partner
        else:
            ranking = descending_order(best)
            source, rest = a.gather(1, ranking[:, :remove]), a.gather(1, ranking[:, remove:])
            target = partner.gather(1, ranking[:, :remove])
        start = torch.arange(prefix, device=metric.device).expand(metric.shape[0], -1)
        kept = torch.cat((start, rest + prefix, b + prefix), dim=1)
        return Merge(kept, source + prefix, target + (kept.shape[1] - b.shape[1]))
