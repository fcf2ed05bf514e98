"""Linear layer with the fastest equivalent kernel of the device.

On a CPU oneDNN's fused linear layer adds the bias inside the product, whereas `F.linear` first fills the output with the bias and then
accumulates: 5 to 10 % faster on vision transformers' shapes in float32. It is used in plain inference only; under autograd, a compiler, an
exporter, a flop counter or a function transform the ordinary operator is called.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Gelu = Literal["none", "tanh"]
"""Forms of GELU, named as the `approximate` argument of `F.gelu`: exact, or approximated by a hyperbolic tangent."""


def in_plain_inference(*tensors: Tensor | None) -> bool:
    """Return whether no observer sees the operators that are called: `only_for_values`, and no dispatch mode is active."""
    return only_for_values(*tensors) and not torch._C._len_torch_dispatch_stack()


def only_for_values(*tensors: Tensor | None) -> bool:
    """Return whether only the values of the result matter: no gradient, no tracing, no function transform. Flop counters may be active."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return not (torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: Gelu | None = None) -> Tensor:
    """Return x W^T + b and, if `gelu` is set, its GELU: (..., in), (out, in), (out,) -> (..., out)."""
    if onednn_serves(x, weight, bias) and x.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], gelu or "")
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate=gelu) if gelu else out


def onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN's fused operators may compute a layer's product: float32 on a CPU, in plain inference."""
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
    """Return whether this build of PyTorch has the operators that inductor's CPU code calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
