"""LoRA: low-rank adapters of the attention's linear layers, y = W x + b + (alpha / r) B A x (Hu et al. 2021).

W and b are frozen, A (r, in) is initialised at random, B (out, r) with zeros: a fresh adapter changes nothing, bit for bit.

    vitarium.apply(model, "lora:rank=8")
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.anatomy import AttentionView, of
from vitarium.catalog.methods import AttachReport, Method, method
from vitarium.catalog.options import validated
from vitarium.errors import AttachError
from vitarium.nn import Linear
from vitarium.perception.retrieval.prompts import freeze


class LowRankLinear(nn.Module):
    """A linear layer with an adapter of rank r; `weight` and `bias` are the layer's own tensors, under their own names."""

    trained_part = True

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.factor = linear.in_features, linear.out_features, rank, alpha / rank
        self.weight, self.bias = linear.weight, linear.bias
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.factor * self.up(self.down(x))

    def merged(self) -> nn.Linear:
        """Return one plain layer that computes the same: W + (alpha / r) B A."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(self.weight)
        with torch.no_grad():
            linear.weight.copy_(self.weight + self.factor * self.up.weight @ self.down.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


@method("lora", kind="adapt")
@validated
class LoRA(Method):
    """Train low-rank adapters of queries, keys, values and output layers; all else but the head is frozen.

    Args:
        rank: rank of each adapter, at least 1.
        alpha: the adapters are multiplied by alpha / rank.
    """

    training: ClassVar[Literal["none", "images", "required"]] = "required"

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 8.0

    def attach(self, model: nn.Module) -> AttachReport:
        """Replace the linear layers of every attention (in EVA only the output layers, because it uses the others' weights directly).

        Raises:
            UnsupportedModel: anatomy does not support the model.
            AttachError: its attention has no plain linear layers.
        """
        view = of(model)
        plain = {id(layer) for block in view.blocks for layer in _layers(block.attention) if type(layer) in (nn.Linear, Linear)}
        names = {id(module): name for name, module in model.named_modules() if id(module) in plain}
        if not names:
            raise AttachError(f"{view.family} has no plain linear layers in its attention for lora to add to")
        report = AttachReport(self, sites=tuple(names.values()))
        for name in names.values():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            adapted = LowRankLinear(linear, self.rank, self.alpha)
            report.replaced[name] = linear
            report.parameters_added += self.rank * (linear.in_features + linear.out_features)
            model.set_submodule(name, adapted)
        report.frozen = freeze(model, view.head)
        return report


def _layers(attention: AttentionView) -> list[Any]:
    """Return the layers that an attention calls. One with separate biases uses its joint layer's weight without calling the layer."""
    layout = attention.layout
    apart = any(attention.part(name) is not None for name in layout.biases)
    return [*(attention.part(name) for name in layout.qkv[1 if apart else 0 :]), attention.proj]
