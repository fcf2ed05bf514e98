"""PTQ4ViT's search for steps, by how much the error of a layer's output matters to the network.

For weights with a step for each group of rows, and an input with one step, the steps are taken from `first * FACTORS` so that

    sum over sampled rows of (g (y - y_q))^2

is least: weights with the input as it is, then the input with the weights as they are, three times. g = 1 gives the squared error of the
output. First steps: absmax / (2^(b-1) - 0.5). Source: Yuan et al., "PTQ4ViT" (ECCV 2022); g^2 as in `calibration`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.efficiency.quantization.ranges import search_step, symmetric_step
from vitarium.ops.number_formats import Integer

ROUNDS = 3
Rounding = Callable[[Tensor, Tensor], Tensor]
"""(values, step) -> values on the grid."""


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
) -> tuple[Tensor, Tensor | None]:
    """Steps of a linear layer's or a convolution's weight, and of its input.

    Args:
        layer: in floating point.
        x, y, g: sampled inputs (R, N) or (R, C, H, W), outputs, and roots of their weights in y's shape (None: ones).
        format: of the weight.
        groups: steps of the weight: 1, a number of row blocks, or all rows.
        round_input, first_input: how the input is rounded, and its first step (a number); None leaves it floating point.

    Returns:
        the weight's steps (groups, 1), and the input's, or None.
    """
    rows = layer.weight.detach().reshape(groups, -1)
    first = symmetric_step(rows.abs().amax(1, keepdim=True), format.bits)

    def run(values: Tensor, step: Tensor) -> Tensor:
        weight = format.quantize(rows, step).view_as(layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(values, weight, layer.bias)
        return layer._conv_forward(values, weight, layer.bias)

    def error(out: Tensor) -> Tensor:
        lost = y - out if g is None else g * (y - out)
        return lost.square().movedim(1, 0).reshape(groups, -1).sum(1)  # outputs are axis 1 of rows and of maps

    def rounded(step: Tensor | None) -> Tensor:
        return x if step is None or round_input is None else round_input(x, step)

    weight_step, input_step = first, first_input
    for _ in range(rounds if round_input is not None else 1):
        before, values = input_step, rounded(input_step)
        weight_step = search_step(first, lambda s, values=values: error(run(values, s)))  # type: ignore[misc]
        if round_input is not None and first_input is not None:
            now = weight_step
            input_step = search_step(first_input, lambda s, now=now: error(run(rounded(s), now)).sum())  # type: ignore[misc]
        if before is None or input_step is None or torch.equal(before, input_step):
            break  # a further round would find the same
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
) -> tuple[Tensor, Tensor]:
    """Steps of both operands of the heads' products, such as q k^T.

    Args:
        a, b, y, g: (B, H, N, K), (B, H, K, M), their product (B, H, N, M), and roots of its weights.
        round_a, round_b: (operand, step) -> rounded operand.
        first_a, first_b: first steps, (H, 1, 1), or (1, 1, 1) for one that all heads share.
        candidates_a: factors on the first operand's first step, where they are not the usual ones.

    Returns:
        the steps, in their shapes.
    """

    def error(step_a: Tensor, step_b: Tensor, like: Tensor) -> Tensor:
        lost = y - round_a(a, step_a) @ round_b(b, step_b)
        heads = (lost if g is None else g * lost).square().sum((0, 2, 3))
        return heads if like.numel() > 1 else heads.sum()

    step_a, step_b = first_a, first_b
    factors = {} if candidates_a is None else {"factors": candidates_a}
    for _ in range(rounds):
        step_a = search_step(first_a, lambda s, b=step_b: error(s, b, first_a), **factors)  # type: ignore[misc]
        step_b = search_step(first_b, lambda s, a=step_a: error(a, s, first_b))  # type: ignore[misc]
    return step_a, step_b
