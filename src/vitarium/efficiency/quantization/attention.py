"""Quantized attention: queries, keys, values and attention weights are rounded, in models that `anatomy` supports.

    logits = Q(q) Q(k)^T,   out = Qs(softmax(logits)) Q(v)

Queries, keys and values have one step per head. Attention weights p use PTQ4ViT's split of [0, 1] at 2^-i: p >= split with step
1 / (2^(b-1) - 1), the others with step split / (2^(b-1) - 1). (PTQ4ViT's code also adds the split to the large ones; this is not followed.)
Steps and split are searched as for a layer, the split against values in floating point (`hessian.fit_product`). Simulated: slower than
the fused kernel.

Notation: B images, H heads, N tokens, D channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitarium.anatomy import Attended, Site, install, of
from vitarium.catalog.calling import call
from vitarium.efficiency.quantization.calibration import draw
from vitarium.efficiency.quantization.hessian import fit_product
from vitarium.efficiency.quantization.ranges import symmetric_step
from vitarium.errors import AttachError
from vitarium.nn.modes import eval_mode, frozen_parameters
from vitarium.ops.number_formats import Integer

SPLITS = tuple(2.0**-i for i in range(20))
MOST_IMAGES = 8


def round_softmax(p: Tensor, split: Tensor, bits: int) -> Tensor:
    """Rounding of attention weights in [0, 1] to the split grid."""
    highest = 2 ** (bits - 1) - 1
    large = (p * highest).round().clamp(0, highest) / highest
    step = split / highest
    return torch.where(p >= split, large, (p / step).round().clamp(0, highest) * step)


class RoundedAttention(Site):
    """A block's attention with rounded operands; without steps it computes the original attention and records the operands.

    Args:
        bits: number of bits of all operands.
        steps: {"q", "k", "v": H numbers each, and "split": a number, or "p": H numbers}; None while calibrating.
        uniform: whether attention weights get one step per head ("p") instead of the split grid, as PTQ4ViT's baseline.
        cosine: whether steps are searched for the smallest angle instead of the least squared error.
    """

    def __init__(self, bits: int, steps: Mapping[str, Any] | None = None, *, uniform: bool = False, cosine: bool = False):
        self.bits, self.steps, self.uniform, self.cosine = bits, steps, uniform, cosine
        self.kept: list[tuple[Tensor, ...]] = []

    def attend(self, attended: Attended) -> Tensor:
        q, k, v = attended.q, attended.k, attended.v
        if self.steps is not None:
            q, k, v = (self._round(x, self.steps[name]) for x, name in zip((q, k, v), "qkv", strict=True))
        product = q @ k.transpose(-2, -1)
        logits = product * attended.scale
        p = (logits if attended.bias is None else logits + attended.bias).softmax(-1)
        if self.steps is not None and "p" in self.steps:
            return self._round(p, self.steps["p"]) @ v
        if self.steps is not None:
            return round_softmax(p, torch.tensor(self.steps["split"], dtype=p.dtype, device=p.device), self.bits) @ v
        out = p @ v
        self.kept.append((q.detach(), k.detach(), p.detach(), v.detach(), product, out))
        return out

    def _round(self, x: Tensor, steps: Sequence[float]) -> Tensor:
        return Integer(self.bits).quantize(x, torch.tensor(steps, dtype=x.dtype, device=x.device).view(-1, 1, 1))

    def fit(self, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Find the steps from q, k, p, v, q k^T, p v and the square roots of the weights of the last two."""
        q, k, p, v, product, out = kept
        format, bits = Integer(self.bits), self.bits
        first = {n: symmetric_step(x.abs().amax((0, 2, 3)).view(-1, 1, 1), bits) for n, x in (("q", q), ("k", k), ("v", v), ("p", p))}
        rounding: dict[str, Any] = dict(round_b=format.quantize, cosine=self.cosine)
        step_q, step_k = fit_product(
            q, k.transpose(-2, -1), product.detach(), grads[0], round_a=format.quantize, first_a=first["q"], first_b=first["k"], **rounding
        )
        if self.uniform:
            grid: dict[str, Any] = dict(round_a=format.quantize, first_a=first["p"])
        else:
            one = torch.ones(1, 1, 1, dtype=p.dtype, device=p.device)
            grid = dict(round_a=lambda x, s: round_softmax(x, s, bits), first_a=one, candidates_a=SPLITS)
        step_p, step_v = fit_product(p, v, out.detach(), grads[1], first_b=first["v"], **grid, **rounding)
        self.steps = {n: s.flatten().tolist() for n, s in (("q", step_q), ("k", step_k), ("v", step_v))}
        self.steps |= {"p": step_p.flatten().tolist()} if self.uniform else {"split": float(step_p)}


def attach_attention(
    model: nn.Module, images: Sequence[Any], bits: int, *, weigh: bool, **options: Any
) -> tuple[dict[str, nn.Module], list[Any], dict[str, Any]]:
    """Calibrate and attach the rounding of every block.

    Args:
        bits: number of bits of all operands, 3 to 8.
        weigh: whether errors are weighted by their effect on the prediction.
        options: uniform and cosine, see `RoundedAttention`.

    Returns:
        the replaced blocks by name, the sites, and their steps as plain values.

    Raises:
        UnsupportedModel: anatomy does not support the model.
        AttachError: another method computes the attention of its blocks.
    """
    if taken := [site for block in of(model).blocks for site in getattr(block.module, "sites", ()) if type(site).attend is not Site.attend]:
        raise AttachError(
            f"attention=true needs the blocks' own attention, which a {type(taken[0]).__name__} replaces; use attention=false"
        )
    replaced, sites = install(model, lambda view: [RoundedAttention(bits, **options) for _ in view.blocks])
    inputs = _joined(images)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_(weigh)
    with eval_mode(model), frozen_parameters(model), torch.set_grad_enabled(weigh):
        output = call(model, inputs)
        kept = [site.kept[-1] for site in sites]  # type: ignore[attr-defined]
        products = [tensor for one in kept for tensor in one[-2:]]
        grads: Sequence[Tensor | None] = [None] * len(products)
        if weigh:
            grads = torch.autograd.grad(draw(output, torch.Generator().manual_seed(0)), products, allow_unused=True)
    for i, site in enumerate(sites):
        site.kept.clear()  # type: ignore[attr-defined]
        site.fit(kept[i], grads[2 * i : 2 * i + 2])  # type: ignore[attr-defined]
    return replaced, list(sites), _steps_of(replaced, sites)


def _joined(images: Sequence[Any]) -> Any:
    """Return the first images, or inputs by name, of some batches as one batch."""
    if isinstance(images[0], Tensor):
        return torch.cat(list(images))[:MOST_IMAGES]
    return {name: torch.cat([batch[name] for batch in images])[:MOST_IMAGES] for name in images[0]}


def _steps_of(names: Mapping[str, nn.Module], sites: Sequence[Any]) -> dict[str, Any]:
    return {name: {"bits": site.bits, **site.steps} for name, site in zip(names, sites, strict=True)}


def rebuild_attention(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, nn.Module], list[Any]]:
    """Attach the rounding of every block with saved steps."""
    rows = [dict(row) for row in state.values()]
    replaced, sites = install(model, lambda _view: [RoundedAttention(row.pop("bits"), row) for row in rows])
    return replaced, list(sites)
