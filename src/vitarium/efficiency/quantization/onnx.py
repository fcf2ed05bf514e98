"""Quantized layers in an ONNX graph: int8 weights on disk, and integer products where the layer has them.

    static input     QuantizeLinear, DequantizeLinear (QDQ) around the product with DequantizeLinear(weight): onnxruntime fuses them to
                     an integer product
    input per token  its codes by Div, Round and Clip, MatMulInteger, DequantizeLinear of its int32 sums with the weight's steps
    two regions      two such products
    float input      the product with DequantizeLinear(weight), transposed, so that onnxruntime (1.32) does not round the input to int8
    convolution      QDQ

QuantizeLinear with a step per row would be the shorter form of the codes per token. ONNX Runtime takes as long for it, and OpenVINO 2026.4
returns an empty tensor for it if the number of rows varies.

Codes of fewer bits than 8 are stored as int8, with the same steps. Before tracing, `exportable` replaces the
quantized layers of a copy of the model by `ExportedLayer`s, which call operators that `translations` maps to these nodes.

Notation: R rows, N inputs, M outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.efficiency.quantization.layers import PerToken, QuantizedConv, QuantizedLayer, QuantizedLinear, Static
from vitarium.errors import UsageError
from vitarium.ops.number_formats import Integer


def exportable(model: nn.Module) -> int:
    """Replace the quantized layers of a model, in place, and return their number.

    Raises:
        UsageError: a weight or an input in a number format that ONNX lacks; the message says what works.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    for name, layer in layers.items():
        _check(name, layer)
    for name, layer in layers.items():
        model.set_submodule(name, ExportedLayer(layer).train(layer.training))
    return len(layers)


def _check(name: str, layer: QuantizedLayer) -> None:
    known = "ONNX holds whole numbers with a step per row; int8, int4w and mptq_vit write such files, and --format torch-export takes any"
    if layer.packed.row_steps is None:
        zero = " with a zero point" if layer.packed.zero is not None else ""
        raise UsageError(f"the weight of {name} is {layer.packed.format}{zero} in {layer.packed.groups} groups: {known}")
    static = layer.activation
    if isinstance(static, Static) and not static.integer:
        raise UsageError(f"the input of {name} is {static.format} with {len(static.step)} steps: {known}")


SHAPE = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
"""Attributes that code around a layer may read."""


class ExportedLayer(nn.Module):
    """A quantized linear layer (..., N) -> (..., M), or a convolution, in the operators of this file.

    Args:
        layer: with whole-number codes and a step per row.
    """

    codes: Tensor
    steps: Tensor

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        _operators()
        self.layer = (layer,)  # in a tuple: not a submodule
        self.bias, self.activation = layer.bias, layer.activation
        for name in SHAPE:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        steps = layer.packed.row_steps
        assert steps is not None
        codes, self.linear = layer.packed.integers(), isinstance(layer, QuantizedLinear)
        self.transposed = self.linear and layer.activation is not None  # (N, M), as an integer product takes it
        self.register_buffer("codes", codes.t().contiguous() if self.transposed else codes.contiguous())
        self.register_buffer("steps", steps.clone())

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, for code that reads a layer's weight."""
        made = torch.ops.vitarium.dequantize(self.codes, self.steps, 1 if self.transposed else 0)
        return made.t() if self.transposed else made

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.activation
        if isinstance(inputs, Static):
            x = _rounded(x, inputs)
        elif inputs is not None:
            if self.linear:
                return self._integer_product(x)
            x = inputs(x)
        if self.linear:
            out = x @ self.weight.t()
            return out if self.bias is None else out + self.bias
        conv = self.layer[0]
        assert isinstance(conv, QuantizedConv)
        return conv._convolve(x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _integer_product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor | None = None
        for codes, step in _terms(self.activation, rows):
            product = torch.ops.vitarium.dequantize(torch.ops.vitarium.integer_product(codes, self.codes), self.steps, 1) * step
            out = product if out is None else out + product
        assert out is not None
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.codes.shape[1])


def _rounded(x: Tensor, inputs: Static) -> Tensor:
    """Return an input on its grid, by QuantizeLinear and DequantizeLinear; values outside of fewer bits than 8 are clamped first."""
    step, format = inputs.step.to(x.dtype).view(()), inputs.format
    assert isinstance(format, Integer)
    if format.bits < 8:
        x = torch.maximum(torch.minimum(x, format.highest * step), format.lowest * step)
    return torch.ops.vitarium.dequantize(torch.ops.vitarium.quantize(x, step), step, 0)


def _terms(inputs: Any, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the terms of an input (R, N): int8 codes and steps; see `Activation.terms`."""
    if isinstance(inputs, PerToken) and inputs.format.bits == 8:
        step = inputs._step(rows)
        return [(torch.ops.vitarium.quantize(rows, step.view(-1)), step)]
    return inputs.terms(rows)


# ---- operators


@functools.cache
def _operators() -> None:
    """Register the operators with PyTorch, once in a process."""

    @torch.library.custom_op("vitarium::quantize", mutates_args=())
    def quantize(x: Tensor, step: Tensor) -> Tensor:
        """Return int8 codes of x with one step (), or a step per row (R,)."""
        step = step.view(-1, *[1] * (x.ndim - 1)) if step.ndim else step
        return (x / step).round().clamp(-128, 127).to(torch.int8)

    @torch.library.custom_op("vitarium::dequantize", mutates_args=())
    def dequantize(codes: Tensor, step: Tensor, axis: int) -> Tensor:
        """Return codes times their steps: one (), or one per index of an axis."""
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        return codes.to(step.dtype) * (step.view(shape) if step.ndim else step)

    @torch.library.custom_op("vitarium::integer_product", mutates_args=())
    def integer_product(a: Tensor, b: Tensor) -> Tensor:
        """Return the int32 product of int8 matrices."""
        return (a.long() @ b.long()).int()

    quantize.register_fake(lambda x, step: torch.empty_like(x, dtype=torch.int8))
    dequantize.register_fake(lambda codes, step, axis: torch.empty_like(codes, dtype=step.dtype))
    integer_product.register_fake(lambda a, b: a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the ONNX nodes of the operators, for `torch.onnx.export`; empty if no quantized layer was exported in this process."""
    if not hasattr(torch.ops.vitarium, "quantize"):
        return {}
    from onnx import TensorProto, helper
    from onnxscript import opset18

    op: Any = opset18  # its annotations describe scripts, not the calls of a tracer

    def constant(kind: int, shape: list[int], value: float) -> Any:
        return op.Constant(value=helper.make_tensor("constant", kind, shape, [value]))

    def quantize(x: Any, step: Any) -> Any:
        if not len(step.shape):
            return op.QuantizeLinear(x, step, constant(TensorProto.INT8, [], 0))
        codes = op.Round(op.Div(x, op.Unsqueeze(step, constant(TensorProto.INT64, [1], 1))))
        return op.Cast(op.Clip(codes, constant(TensorProto.FLOAT, [], -128), constant(TensorProto.FLOAT, [], 127)), to=TensorProto.INT8)

    def dequantize(codes: Any, step: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, step, axis=axis)

    def integer_product(a: Any, b: Any) -> Any:
        return op.MatMulInteger(a, b)

    ops = torch.ops.vitarium
    return {ops.quantize.default: quantize, ops.dequantize.default: dequantize, ops.integer_product.default: integer_product}
