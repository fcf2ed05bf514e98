"""The linear layer, by the fastest kernel of the device that says the same.

On a CPU oneDNN's fused linear layer writes the bias with the product, where `F.linear` first fills the output with the bias and then
accumulates: 5 to 10 % faster on vision transformers' shapes in float32. It is used in plain inference only; wherever somebody looks on
(autograd, a compiler, an exporter, a flop counter, a function transform) the ordinary operator is called.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Gelu = Literal["none", "tanh"]
"""Forms of GELU by the names of `F.gelu`'s `approximate`: exact, or by a hyperbolic tangent."""


def in_plain_inference(*tensors: Tensor | None) -> bool:
    """Whether nothing observes the operators that are called: as `only_for_values`, and no dispatch mode."""
    return only_for_values(*tensors) and not torch._C._len_torch_dispatch_stack()


def only_for_values(*tensors: Tensor | None) -> bool:
    """Whether nothing but the result is wanted: no gradient, no tracing, no function transform. Counters of operators may look on."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return not (torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: Gelu | None = None) -> Tensor:
    """x W^T + b, with `gelu` the GELU of it: (..., in), (out, in), (out,) -> (..., out)."""
    if onednn_serves(x, weight, bias) and x.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], gelu or "")
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate=gelu) if gelu else out


def onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer's product may go to oneDNN's fused operators: float32 on a CPU, in plain inference."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype is torch.float32 is weight.dtype
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn()
        and not torch.is_autocast_enabled("cpu")
        and in_plain_inference(x, weight, bias)
    )


def _has_onednn() -> bool:
    """Whether this build of PyTorch has the operators that inductor's own CPU code calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
