"""The linear layer, by the fastest kernel of the device that says the same.

On a CPU oneDNN's fused linear layer writes the bias with the product, where `F.linear` first fills the output with the bias and then
accumulates: 5 to 10 % faster on vision transformers' shapes in float32. It is used in plain inference only; wherever somebody looks on
(autograd, a compiler, an exporter, a flop counter, a function transform) the ordinary operator is called.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x W^T + b, with `gelu` its exact GELU: (..., in), (out, in), (out,) -> (..., out)."""
    if (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype is torch.float32 is weight.dtype
        and x.numel() > 0
        and x.is_contiguous()
        and torch.backends.mkldnn.enabled
        and _has_onednn()
        and not torch.is_autocast_enabled("cpu")
        and in_plain_inference(x, weight, bias)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def _has_onednn() -> bool:
    """Whether this build of PyTorch has the operator that inductor's own CPU code calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
