"""Low-bit layers: weights packed in memory and on disk, inputs quantized at run time.

    layer = QuantizedLinear.of(nn.Linear(...), Packed.of(weight, Integer(4), step), PerToken(8))

If weight and input are integers of at most 8 bits, inference runs on int8 matrix products with exact int32 sums (`torch._int_mm`), on the
same integers that the simulation multiplies as floats. Otherwise (other formats, gradients, exporters) the layer is simulated: the weight
is unpacked and the input rounded at each call, which is slower than float32.

A layer is described by plain values (`describe`) and rebuilt from them without its weights (`rebuilt`), so a saved file holds its tensors
and that description. Notation: B rows, N inputs, M outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import UsageError
from vitarium.nn.convolutions import Conv2d
from vitarium.nn.layers import Linear
from vitarium.ops.linear import in_plain_inference
from vitarium.ops.number_formats import Format, Integer, parse_format
from vitarium.ops.packing import pack, packed_bytes, unpack


class Packed(nn.Module):
    """A weight as densely packed codes, with a step for each group.

    Args:
        shape: of the weight.
        format: number format of the codes.
        groups: number of equal runs of the row-major weight with a step each: 1 (whole tensor), the number of rows, of row blocks, ...
        zero: whether each group also has a zero point.
        dtype: of the steps and of the unpacked weight.

    Raises:
        UsageError: the number of groups does not divide the weight.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor | None

    def __init__(self, shape: tuple[int, ...], format: Format, groups: int = 1, *, zero: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        count = math.prod(shape)
        if groups < 1 or count % groups:
            raise UsageError(f"a weight of {'x'.join(map(str, shape))} does not divide into {groups} groups")
        self.shape, self.format, self.groups = tuple(shape), format, groups
        self.register_buffer("codes", torch.zeros(packed_bytes(count, format.bits), dtype=torch.uint8))
        self.register_buffer("step", torch.ones(groups, 1, dtype=dtype))
        self.register_buffer("zero", torch.zeros(groups, 1, dtype=dtype) if zero else None)

    @classmethod
    def of(cls, weight: Tensor, format: Format, step: Tensor, zero: Tensor | None = None) -> Packed:
        """Quantize and pack a weight. Step and zero point: one for each group, any shape."""
        packed = cls(tuple(weight.shape), format, step.numel(), zero=zero is not None, dtype=weight.dtype).to(weight.device)
        packed.step = step.detach().view(-1, 1).to(weight.dtype)
        packed.zero = None if zero is None else zero.detach().view(-1, 1).to(weight.dtype)
        codes = format.encode(weight.detach().reshape(packed.groups, -1), packed.step, packed.zero)
        packed.codes = pack(codes, format.bits).clone()
        return packed

    def forward(self) -> Tensor:
        """Return the weight in floating point, (shape)."""
        return self.format.decode(self._unpacked(), self.step, self.zero).view(self.shape)

    def integers(self) -> Tensor:
        """Return the codes as int8, (shape); for signed integer formats."""
        assert isinstance(self.format, Integer)
        return self.format.integers(self._unpacked()).view(self.shape)

    def _unpacked(self) -> Tensor:
        return unpack(self.codes, self.format.bits, math.prod(self.shape)).view(self.groups, -1)

    @property
    def row_steps(self) -> Tensor | None:
        """Return a step per row, (rows,), if rows have one step and no zero point, so that integer products can be scaled; else None."""
        if self.zero is not None or not isinstance(self.format, Integer) or not self.format.signed or self.shape[0] % self.groups:
            return None
        return self.step.view(-1).repeat_interleave(self.shape[0] // self.groups)

    def describe(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return {"format": str(self.format), "groups": self.groups} | ({"zero": True} if self.zero is not None else {})

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.format}, groups={self.groups}"


# ---- inputs


class Activation(nn.Module):
    """Quantization of a layer's input: (..., N) -> the same shape, on a grid. Subclasses are registered by `@activation(kind)`."""

    kind: ClassVar[str]

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    @property
    def integer(self) -> bool:
        """Return whether the input can be split into integer terms."""
        return False

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the input as whole numbers: x (B, N) = sum of codes (B, N) int8 * step (broadcast to (B, 1))."""
        raise NotImplementedError(f"{type(self).__name__} does not define terms")

    def describe(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        raise NotImplementedError(f"{type(self).__name__} does not define describe")


_ACTIVATIONS: dict[str, type[Activation]] = {}
ActivationClass = TypeVar("ActivationClass", bound="type[Activation]")


def activation(kind: str) -> Callable[[ActivationClass], ActivationClass]:
    """Register a quantization of inputs under the name that saved files use."""

    def register(cls: ActivationClass) -> ActivationClass:
        cls.kind = kind
        _ACTIVATIONS[kind] = cls
        return cls

    return register


@activation("static")
class Static(Activation):
    """A calibrated step for the tensor, or for each channel.

    Args:
        format: name or format.
        channels: number of steps along the last axis; 1 for the tensor.
        zero: whether there are zero points.
    """

    step: Tensor
    zero: Tensor | None

    def __init__(self, format: str | Format, channels: int = 1, *, zero: bool = False):
        super().__init__()
        self.format = parse_format(format) if isinstance(format, str) else format
        self.register_buffer("step", torch.ones(channels))
        self.register_buffer("zero", torch.zeros(channels) if zero else None)

    @classmethod
    def of(cls, format: Format, step: Tensor, zero: Tensor | None = None) -> Static:
        """Create with calibrated values."""
        made = cls(format, step.numel(), zero=zero is not None)
        made.step, made.zero = step.detach().view(-1), None if zero is None else zero.detach().view(-1)
        return made

    def forward(self, x: Tensor) -> Tensor:
        zero = None if self.zero is None else self.zero.to(x.dtype)
        return self.format.quantize(x, self.step.to(x.dtype), zero)

    @property
    def integer(self) -> bool:
        return self.zero is None and len(self.step) == 1 and isinstance(self.format, Integer) and self.format.signed

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(self.format, Integer)
        step = self.step.to(x.dtype)
        return [(self.format.round(x, step).to(torch.int8), step)]

    def describe(self) -> dict[str, Any]:
        return (
            {"format": str(self.format)}
            | ({"channels": len(self.step)} if len(self.step) > 1 else {})
            | ({"zero": True} if self.zero is not None else {})
        )


@activation("token")
class PerToken(Activation):
    """A step for each token, computed at run time: absmax / (2^(bits-1) - 1). Needs no calibration."""

    def __init__(self, bits: int = 8):
        super().__init__()
        self.format = Integer(bits)

    def _step(self, x: Tensor) -> Tensor:
        return (x.abs().amax(-1, keepdim=True) / self.format.highest).clamp(min=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.format.quantize(x, self._step(x))

    @property
    def integer(self) -> bool:
        return True

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        step = self._step(x)
        return [(self.format.round(x, step).to(torch.int8), step)]

    def describe(self) -> dict[str, Any]:
        return {"bits": self.format.bits}


# ---- layers


class QuantizedLayer(nn.Module):
    """Base of layers with a packed weight. `weight` unpacks it, for code that reads a layer's weight.

    Args:
        packed: the weight.
        bias: (M,) or None; stays in floating point.
        activation: quantization of the input; None: not quantized.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, activation: Activation | None):
        super().__init__()
        self.packed, self.activation = packed, activation
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def simulated(self) -> bool:
        """Return whether the layer has no integer product and computes in floating point, slower than the original layer."""
        return True

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, unpacked at each use."""
        return self.packed()

    def describe(self) -> dict[str, Any]:
        """Return what `rebuilt` needs, apart from the layer to replace, as plain values."""
        row: dict[str, Any] = {"weight": self.packed.describe(), "bias": self.bias is not None}
        if self.activation is not None:
            row["input"] = {"kind": self.activation.kind, **self.activation.describe()}
        return row


class QuantizedLinear(QuantizedLayer):
    """A linear layer (..., N) -> (..., M)."""

    def __init__(self, packed: Packed, bias: Tensor | None, activation: Activation | None = None):
        super().__init__(packed, bias, activation)
        self.out_features, self.in_features = packed.shape

    @classmethod
    def of(cls, layer: nn.Linear, packed: Packed, activation: Activation | None = None) -> QuantizedLinear:
        """Create the counterpart of a linear layer, with its bias."""
        return cls(packed, layer.bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is None:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        if self._integer_product(x):
            terms = self.activation.terms(x.reshape(-1, self.in_features))
            return self._multiply(terms).view(*x.shape[:-1], self.out_features)
        return F.linear(self.activation(x), self.weight.to(x.dtype), self.bias)

    @property
    def simulated(self) -> bool:
        """Return whether weight or input is not a plain integer."""
        return self.packed.row_steps is None or self.activation is None or not self.activation.integer

    def _integer_product(self, x: Tensor) -> bool:
        """Return whether int8 matrix products can be used for this call."""
        if self.simulated or x.numel() == 0 or torch.compiler.is_exporting():
            return False
        if not torch.compiler.is_compiling() and not in_plain_inference(x):
            return False
        if x.device.type == "cuda":  # cuBLAS's conditions on int8 matrices
            return x.numel() // self.in_features > 16 and self.in_features % 8 == 0 and self.out_features % 8 == 0
        return x.device.type == "cpu"

    def _multiply(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the sum over terms of (codes W^T) * step * row steps, plus the bias."""
        weight, rows = self.packed.integers().t(), self.packed.row_steps
        assert rows is not None
        out: Tensor | None = None
        for codes, step in terms:
            product = torch._int_mm(codes, weight).to(step.dtype) * step
            out = product if out is None else out + product
        assert out is not None
        out = out * rows.to(out.dtype)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedConv(QuantizedLayer):
    """A convolution in 1, 2 or 3 dimensions; always simulated."""

    def __init__(self, original: Any, packed: Packed, bias: Tensor | None, activation: Activation | None = None):
        super().__init__(packed, bias, activation)
        self._convolve = getattr(F, f"conv{len(packed.shape) - 2}d")
        names = ("stride", "padding", "dilation", "groups")
        self.stride, self.padding, self.dilation, self.groups = (getattr(original, name) for name in names)
        self.kernel_size, self.out_channels, self.in_channels = original.kernel_size, original.out_channels, original.in_channels

    @classmethod
    def of(cls, layer: nn.Module, packed: Packed, activation: Activation | None = None) -> QuantizedConv:
        """Create the counterpart of a convolution, with its bias."""
        return cls(layer, packed, layer.bias, activation)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.activation is None else self.activation(x)
        return self._convolve(x, self.weight.to(x.dtype), self.bias, self.stride, self.padding, self.dilation, self.groups)


PLAIN_FORWARDS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Linear, Conv2d)}
"""Forwards that compute x W^T + b, or the convolution with the layer's own padding. A subclass with another one (which pads or rearranges
its input, as TensorFlow's "same" convolution) computes something else, and is left in floating point."""


def can_quantize(module: nn.Module) -> bool:
    """Return whether a module has a quantized counterpart: a linear layer, or a convolution with zero padding, with a plain forward."""
    if type(module).forward not in PLAIN_FORWARDS:
        return False
    if isinstance(module, nn.Linear):
        return module.weight.numel() > 0
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode == "zeros"


def quantized(layer: nn.Module, packed: Packed, activation: Activation | None = None) -> QuantizedLinear | QuantizedConv:
    """Return the quantized counterpart of a layer."""
    if isinstance(layer, nn.Linear):
        return QuantizedLinear.of(layer, packed, activation)
    return QuantizedConv.of(layer, packed, activation)


def rebuilt(layer: nn.Module, row: Mapping[str, Any]) -> QuantizedLinear | QuantizedConv:
    """Return the counterpart of a layer from its description (`QuantizedLayer.describe`), on the layer's device; values are not set.

    Raises:
        UsageError: unknown format or kind of input in the description.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    with torch.device(weight.device):
        described = dict(row["weight"])
        format = parse_format(described.pop("format"))
        packed = Packed(tuple(weight.shape), format, dtype=weight.dtype, **described)  # type: ignore[arg-type]
        inputs = dict(row.get("input", {}))
        kind = inputs.pop("kind", None)
        if kind is not None and kind not in _ACTIVATIONS:
            raise UsageError(f"unknown kind of quantized input {kind!r} (accepted: {', '.join(_ACTIVATIONS)})")
        made = quantized(layer, packed, None if kind is None else _ACTIVATIONS[kind](**inputs))
        made.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype), requires_grad=False) if row["bias"] else None
    return made.train(layer.training)


def find_layers(model: nn.Module, *, skip: tuple[str, ...] = (), convolutions: bool = True) -> dict[str, nn.Module]:
    """Return the layers of a model that can be quantized, by name, in order; a shared layer appears once, under its first name.

    Args:
        skip: shell patterns of names to leave out, such as "head" or "*.proj".
        convolutions: whether to include convolutions.
    """
    import fnmatch

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if convolutions else (nn.Linear,)
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, kinds) and can_quantize(module) and not any(fnmatch.fnmatch(name, pattern) for pattern in skip)
    }
