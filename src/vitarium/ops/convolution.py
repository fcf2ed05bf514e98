"""2-D convolution with the fastest equivalent kernel of the device.

On a CPU PyTorch's 1 x 1 convolutions are slow (the output is filled with the bias, then accumulated image by image), and a GELU after a
convolution reads the whole map once more. oneDNN's fused convolution does all three in one pass over a channels-last map: an inverted
bottleneck takes 0.6 of the time. It is used under the conditions of `ops/linear.py`: in plain inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.ops.linear import Gelu, onednn_serves

Pair = tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    gelu: Gelu | None = None,
) -> Tensor:
    """Apply `F.conv2d` and, if `gelu` is set, a GELU: (B, C_in, H, W), (C, C_in / groups, k, k), (C,) -> (B, C, H', W')."""
    if onednn_serves(x, weight, bias) and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        name = "gelu" if gelu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, name, [], gelu or "")
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.gelu(out, approximate=gelu) if gelu else out
