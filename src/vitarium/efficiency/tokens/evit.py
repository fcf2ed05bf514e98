"""EViT: at three blocks, image tokens to which the class token pays little attention are dropped or fused into one.

"Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (Liang et al., ICLR 2022). In a block with
keep rate k, between attention and MLP, over the N image tokens x_i (prefix tokens are kept):

    a_i = mean over heads of softmax(q_class k_i^T / sqrt(D))        computed by the block's attention
    L   = ceil(k N),   kept = the L largest a_i, in descending order
    f   = sum over the others of a_i x_i                             fused token; the weights are not normalised
    x   = [prefix, x_kept, f]

No parameters: a DeiT checkpoint runs unchanged. In later layers the fused token is an ordinary image token, and may be dropped or fused
again: with k = 0.7 at blocks 4, 7 and 10 (3, 6, 9 from 0), 196 image tokens become 139, 99, 71, and DeiT-S needs 3.0 instead of 4.6 GMACs.
The authors train with the method: the rate falls from 1 to k (`annealed_keep`); `report.tune(keep=...)` sets it at each step.

Source: the authors' code (youweiliang/evit), equal to rounding. Differences: the distillation token and registers are protected like the
class token; equal attentions keep their order; a fused token has no position, so rotary models need fuse=False. At another image size than
the model's, our ViTs resample positions as the authors' code does (plain bicubic) and timm's as timm does. Cost: one attention row.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from vitarium.anatomy import Anatomy, Attended, Tokens
from vitarium.catalog.methods import method
from vitarium.catalog.options import Numbers, Share, validated
from vitarium.efficiency.tokens.reducer import Reducer
from vitarium.errors import AttachError, UsageError
from vitarium.ops.merging import rows
from vitarium.ops.sorting import descending_order


@method("evit", kind="reduce")
@validated
class EViT(Reducer):
    """Token reduction by the class token's attention.

    Args:
        keep: share of the image tokens that each of these blocks keeps, (0, 1]; 1 changes nothing. Live.
        blocks: numbers of these blocks, from 0; None: depth / 4, depth / 2 and 3 depth / 4 (3, 6, 9 of 12).
        fuse: whether the other tokens are fused into one; False drops them. Live.
        tokens: number of image tokens that each of `blocks` keeps, instead of `keep`. Live.
        score: "class": attention of the class token; "mean": mean attention of all image tokens, for models without a class token.
    """

    keep: Share = 0.7
    blocks: Numbers | None = None
    fuse: bool = True
    tokens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] | None = None
    score: Literal["class", "mean"] = "class"

    tunable: ClassVar[tuple[str, ...]] = ("keep", "fuse", "tokens")

    def __post_init__(self) -> None:
        if self.tokens is not None and (self.blocks is None or len(self.tokens) != len(self.blocks)):
            raise UsageError(f"tokens={list(self.tokens)} needs blocks, one for each number; got blocks={self.blocks}")

    def acts_on(self, block: int, depth: int) -> bool:
        return block in self._blocks(depth)

    def _blocks(self, depth: int) -> tuple[int, ...]:
        return self.blocks if self.blocks is not None else tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))

    @property
    def can_restore(self) -> bool:
        return False  # dropped patches have no representative and a fused token is no mean, so pooling heads pool the remaining tokens

    def check(self, view: Anatomy) -> None:
        if self.score == "class" and not view.class_token:
            raise AttachError(f"{view.family} has no class token for the scores; score='mean' uses the attention of all image tokens")
        if self.fuse and view.rotary:
            raise AttachError(f"{view.family} uses rotary position embedding, and a fused token has no position; use fuse=False")
        if self.blocks is not None and max(self.blocks, default=0) >= view.depth:
            raise AttachError(f"the model has blocks 0 to {view.depth - 1}; blocks={list(self.blocks)} names others")

    def reduce(self, tokens: Tokens, attended: Attended, block: int, depth: int) -> None:
        image = tokens.count - tokens.prefix
        left = math.ceil(self.keep * image) if self.tokens is None else self.tokens[self._blocks(depth).index(block)]
        if left >= image:
            return
        score = self._score(tokens, attended)
        order = descending_order(score)
        batch, prefix = score.shape[0], torch.arange(tokens.prefix, device=score.device).expand(score.shape[0], -1)
        keep = torch.cat((prefix, order[:, :left] + tokens.prefix), dim=1)
        x = rows(tokens.x, keep)
        end = tokens.prefix + left if self.fuse else -1
        assignment = torch.full((batch, tokens.count), end, device=score.device)
        assignment = assignment.scatter(1, keep, torch.arange(tokens.prefix + left, device=score.device).expand(batch, -1))
        if self.fuse:
            weights = score.scatter(1, order[:, :left], 0.0).to(x.dtype)
            x = torch.cat((x, weights[:, None] @ tokens.x[:, tokens.prefix :]), dim=1)
            keep = torch.cat((keep, keep.new_full((batch, 1), -1)), dim=1)
        tokens.move(x, keep, assignment)

    def _score(self, tokens: Tokens, attended: Attended) -> torch.Tensor:
        """Return the scores of the image tokens, (B, N - prefix)."""
        start = tokens.prefix
        if self.score == "class":
            return attended.weights(slice(0, 1)).mean(dim=1)[:, 0, start:]
        return attended.weights(slice(start, None)).mean(dim=(1, 2))[:, start:]


def annealed_keep(step: int, *, keep: float, start: int, steps: int) -> float:
    """Return the keep rate of a training step: 1 up to `start`, then along a cosine down to `keep` within `steps`, then `keep`.

    The authors' recipes: 300 epochs from scratch with start after 10 epochs and 100 epochs of descent; fine-tuning with steps=0.
    """
    if step < start:
        return 1.0
    done = 1.0 if steps == 0 else min(1.0, (step - start) / steps)
    return keep + (1 - keep) * (math.cos(math.pi * done) + 1) / 2
