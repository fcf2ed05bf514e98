"""PTQ4ViT's search for quantization steps, weighted by the importance of each output.

The steps of a weight (one per group of rows) and of an input (one) are chosen from `first * FACTORS` to minimise

    sum over sampled rows of (g (y - y_q))^2

alternately: the weight's with the input as it is, then the input's with the weight fixed, three times. g = 1 gives the squared error of the
output. First steps: absmax / (2^(b-1) - 0.5). Source: Yuan et al., "PTQ4ViT" (ECCV 2022); g^2 as in `calibration`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.efficiency.quantization.ranges import FACTORS, search_step, symmetric_step
from vitarium.ops.number_formats import Integer

ROUNDS = 3
COSINE_FACTORS = tuple(0.5 + 0.7 * i / 100 for i in range(100))
"""Factors of the first step that PTQ4ViT's baseline (its configuration BasePTQ) tries, in one round, for the smallest angle."""
Rounding = Callable[[Tensor, Tensor], Tensor]
"""Rounding function: (values, step) -> values on the grid."""


@torch.no_grad()
def fit_layer(
    layer: Any,
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    format: Integer,
    *,
    groups: int = 1,
    round_input: Rounding | None = None,
    first_input: Tensor | None = None,
    rounds: int = ROUNDS,
    cosine: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Search the steps of a linear layer's or a convolution's weight, and of its input.

    Args:
        layer: in floating point.
        x, y, g: sampled inputs (R, N) or (R, C, H, W), outputs, and square roots of their importance in y's shape (None: ones).
        format: number format of the weight.
        groups: number of steps of the weight: 1, a number of row blocks, or all rows.
        round_input, first_input: rounding of the input, and its first step (a number); None: the input stays in floating point.
        rounds: largest number of alternations.
        cosine: search for the smallest angle between the outputs of each row, in one round, instead of the least squared error.

    Returns:
        the weight's steps (groups, 1), and the input's step or None.
    """
    rows = layer.weight.detach().reshape(groups, -1)
    first = symmetric_step(rows.abs().amax(1, keepdim=True), format.bits)

    def run(values: Tensor, step: Tensor) -> Tensor:
        weight = format.quantize(rows, step).view_as(layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(values, weight, layer.bias)
        return layer._conv_forward(values, weight, layer.bias)

    factors, rounds = (COSINE_FACTORS, 1) if cosine else (FACTORS, rounds)

    def error(out: Tensor) -> Tensor:
        if cosine:
            theirs, ours = (t.movedim(1, -1).unflatten(-1, (groups, -1)) for t in (y, out))
            return -F.cosine_similarity(theirs, ours, dim=-1).flatten(0, -2).sum(0)
        lost = y - out if g is None else g * (y - out)
        return lost.square().movedim(1, 0).reshape(groups, -1).sum(1)  # axis 1 is the output axis of both rows and maps

    def whole(out: Tensor) -> Tensor:
        if cosine:
            return -F.cosine_similarity(y.movedim(1, -1), out.movedim(1, -1), dim=-1).sum()
        return error(out).sum()

    def rounded(step: Tensor | None) -> Tensor:
        return x if step is None or round_input is None else round_input(x, step)

    weight_step, input_step = first, first_input
    for _ in range(rounds if round_input is not None else 1):
        before, values = input_step, rounded(input_step)
        weight_step = search_step(first, lambda s, values=values: error(run(values, s)), factors)  # type: ignore[misc]
        if round_input is not None and first_input is not None:
            now = weight_step
            input_step = search_step(first_input, lambda s, now=now: whole(run(rounded(s), now)), factors)  # type: ignore[misc]
        if before is None or input_step is None or torch.equal(before, input_step):
            break  # converged
    return weight_step, input_step


@torch.no_grad()
def fit_product(
    a: Tensor,
    b: Tensor,
    y: Tensor,
    g: Tensor | None,
    *,
    round_a: Rounding,
    round_b: Rounding,
    first_a: Tensor,
    first_b: Tensor,
    candidates_a: tuple[float, ...] | None = None,
    rounds: int = ROUNDS,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Search the steps of both operands of a batched product over heads, such as q k^T.

    Args:
        a, b, y, g: (B, H, N, K), (B, H, K, M), their product (B, H, N, M), and square roots of its importance.
        round_a, round_b: (operand, step) -> rounded operand.
        first_a, first_b: first steps, (H, 1, 1), or (1, 1, 1) for a step shared by all heads.
        candidates_a: factors of the first operand's first step, which is then searched against the second operand in floating point, as
            PTQ4ViT searches the split of attention weights. None: FACTORS, against the rounded second operand.
        rounds, cosine: as for `fit_layer`.

    Returns:
        the two steps, in the shapes of the first ones.
    """

    factors, rounds = (COSINE_FACTORS, 1) if cosine else (FACTORS, rounds)

    def error(out: Tensor, like: Tensor) -> Tensor:
        lost = y - out
        squares = (lost if g is None else g * lost).square()
        heads = -F.cosine_similarity(y, out, dim=-1).sum((0, 2)) if cosine else squares.sum((0, 2, 3))
        return heads if like.numel() > 1 else heads.sum()

    step_a, step_b = first_a, first_b
    if candidates_a is not None:
        step_a = search_step(first_a, lambda s: error(round_a(a, s) @ b, first_a), candidates_a)
    for _ in range(rounds if candidates_a is None else 1):  # a split does not depend on the other step, so that one round settles both
        if candidates_a is None:
            b_rounded = round_b(b, step_b)
            step_a = search_step(first_a, lambda s, b=b_rounded: error(round_a(a, s) @ b, first_a), factors)  # type: ignore[misc]
        a_rounded = round_a(a, step_a)
        step_b = search_step(first_b, lambda s, a=a_rounded: error(a @ round_b(b, s), first_b), factors)  # type: ignore[misc]
    return step_a, step_b
