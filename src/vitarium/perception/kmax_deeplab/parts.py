"""Parts of both decoders: convolution with batch norm and activation, and the authors' resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.convolutions import ConvNorm as BaseConvNorm

BN_EPS = 1e-3


class ConvNorm(BaseConvNorm):
    """Convolution, batch norm and, with `act`, GELU, in this model's initialisation: (B, in_dim, *) -> (B, dim, *), same size.

    Args:
        axes: 2 for maps, 1 for queries.
        kernel_size: odd side of the kernel.
        depthwise: whether each channel has its own kernel.
        dilation: step between the kernel's taps.
        act: whether a GELU follows.
        bias: whether the convolution has a bias.
        momentum: of the batch norm's running statistics.
        gain: initial weight of the batch norm; 0 makes a residual branch start as the identity.
        std: of the initial weights; None: He's, or Xavier's for depthwise kernels.
    """

    names = ("conv", "norm")

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        *,
        axes: int = 2,
        depthwise: bool = False,
        dilation: int = 1,
        act: bool = False,
        bias: bool = False,
        momentum: float = 0.01,
        gain: float = 1.0,
        std: float | None = None,
    ):
        super().__init__(
            in_dim,
            dim,
            kernel_size,
            dilation=dilation,
            groups=dim if depthwise else 1,
            bias=bias,
            act=nn.GELU if act else None,
            axes=axes,
            norm=batch_norm(dim, axes, momentum, gain),
        )
        conv: Any = self.conv
        if depthwise:
            nn.init.xavier_uniform_(conv.weight)
        else:
            truncated_normal(conv.weight, (2 / in_dim) ** 0.5 if std is None else std)
        if bias:
            nn.init.zeros_(conv.bias)


def batch_norm(dim: int, axes: int, momentum: float, gain: float = 1.0) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """Create the batch norm used throughout these decoders."""
    norm = (nn.BatchNorm2d if axes == 2 else nn.BatchNorm1d)(dim, eps=BN_EPS, momentum=momentum)
    nn.init.constant_(norm.weight, gain)
    return norm


def truncated_normal(weight: Tensor, std: float) -> None:
    """Fill with normal values within two standard deviations, in place."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, h, w) -> (B, C, *size), bilinear; corners are aligned if w is odd, as for maps 2^k n + 1 wide."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=x.shape[-1] % 2 == 1)
