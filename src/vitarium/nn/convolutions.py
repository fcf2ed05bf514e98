"""Convolutions for fast inference: fused activations, foldable batch norms, and large batches processed a few images at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.folding import fold_pair
from vitarium.nn.layers import PIECE_BYTES
from vitarium.ops.convolution import conv2d
from vitarium.ops.linear import Gelu, in_plain_inference


class Conv2d(nn.Conv2d):
    """nn.Conv2d that calls the fastest kernel of the device (see `vitarium.ops.convolution`): (B, C_in, H, W) -> (B, C, H', W')."""

    def forward(self, x: Tensor, gelu: Gelu | None = None) -> Tensor:
        """Convolve; with `gelu` ("none" or "tanh", as in `F.gelu`), apply the GELU as well."""
        if self.padding_mode == "zeros" and isinstance(self.padding, tuple):
            stride = self.stride
            if self.kernel_size == (1, 1) and stride != (1, 1) and self.padding == (0, 0):
                # PyTorch's weight gradient of a strided 1 x 1 writes beyond its memory on a CPU for a channels-last x with fewer than 16
                # channels (2.15.0: the process dies or other tensors are overwritten). Only these pixels are used in any case.
                x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
            where = dict(stride=stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
            return conv2d(x, self.weight, self.bias, **cast(Any, where), gelu=gelu)
        out = super().forward(x)
        return F.gelu(out, approximate=gelu) if gelu else out


def conv_norm_gelu(x: Tensor, conv: nn.Module, norm: nn.Module | None = None, approximate: Gelu = "none") -> Tensor:
    """Compute GELU(norm(conv(x))); in a single kernel if the norm is folded and `conv` is a `Conv2d` without hooks."""
    no_norm = norm is None or (type(norm) is nn.Identity and not norm._forward_hooks)
    if no_norm and isinstance(conv, Conv2d) and not conv._forward_hooks:
        return conv(x, approximate)
    y = conv(x)
    return F.gelu(y if norm is None else norm(y), approximate=approximate)


class ConvNorm(nn.Module):
    """Convolution, batch norm and an optional activation; a single convolution after `fold`: (B, in_dim, H, W) -> (B, dim, H', W').

    Args:
        in_dim, dim: channels before and after.
        kernel_size, stride, dilation, groups, bias: of the convolution.
        padding: zeros on each side; None: (kernel_size // 2) * dilation, so that H' = ceil(H / stride) for odd kernels.
        act: class of the activation, or None.
        axes: 2 for maps, 1 for sequences (B, in_dim, N).
        norm: the norm, in place of a default `nn.BatchNorm2d(dim)`.

    Attributes:
        names: names of the convolution and the norm; a subclass sets those of its checkpoints.
    """

    names = ("conv", "bn")

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        act: type[nn.Module] | None = None,
        axes: int = 2,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        around = kernel_size // 2 * dilation if padding is None else padding
        conv: type[nn.Conv1d | nn.Conv2d] = Conv2d if axes == 2 else nn.Conv1d
        self.add_module(self.names[0], conv(in_dim, dim, kernel_size, stride, around, dilation, groups, bias))
        self.add_module(self.names[1], nn.BatchNorm2d(dim) if norm is None else norm)
        self.act = None if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.pair()
        y = norm(conv(x))
        return y if self.act is None else self.act(y)

    def activated(self, x: Tensor) -> Tensor:
        """Return the GELU of convolution and norm, in one kernel after `fold`."""
        return conv_norm_gelu(x, *self.pair())

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Return the convolution and the norm."""
        return getattr(self, self.names[0]), getattr(self, self.names[1])

    def fold(self) -> None:
        """Fold the norm into the convolution."""
        fold_pair(self, *self.names)


class ConvMlp(nn.Module):
    """MLP of 1 x 1 convolutions with a depth-wise 3 x 3 before the GELU: (B, dim, H, W) -> the same shape.

    Args:
        dim, hidden_dim: channels outside and inside.
        drop: dropout rate after the activation and at the end.

    Attributes:
        depthwise: name of the depth-wise convolution; a subclass sets that of its checkpoints.
    """

    depthwise = "dwconv"

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.fc1: nn.Conv2d = Conv2d(dim, hidden_dim, 1)
        self.add_module(self.depthwise, Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim))
        self.fc2 = Conv2d(hidden_dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, self._mix, x, self.hidden_dim)

    def _mix(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(conv_norm_gelu(self.fc1(x), getattr(self, self.depthwise)))))


def by_images(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, channels: int) -> Tensor:
    """Compute forward(x); in inference on a CPU, process few enough images at a time that the intermediate maps stay in the cache.

    Full-batch buffers would be reallocated on every call, which costs more than the arithmetic on them.

    Args:
        module: owner of `forward`. If a submodule has hooks, the batch is not split, so that they see all of it.
        forward: function that processes each image independently, (B, C, H, W) -> (B, C', H', W').
        x: (B, C, H, W).
        channels: channels of the largest intermediate map, at the height and width of x.
    """
    if torch.compiler.is_compiling() or module.training or x.device.type != "cpu" or not in_plain_inference(x, *module.parameters()):
        return forward(x)
    most = max(1, PIECE_BYTES // max(1, channels * x.shape[2] * x.shape[3] * x.element_size()))
    if len(x) <= most or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module):
        return forward(x)
    return torch.cat([forward(piece) for piece in x.split(most)])
