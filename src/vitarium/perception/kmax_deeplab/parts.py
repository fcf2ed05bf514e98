"""Parts of both decoders: convolution with batch norm and activation, resizing as the authors do it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.folding import fold_norm_after

BN_EPS = 1e-3


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, GELU where `act`: (B, in_dim, *) -> (B, dim, *), the map's size kept.

    Args:
        axes: 2 for maps, 1 for queries.
        kernel_size: odd side of the kernel.
        depthwise: one kernel a channel.
        dilation: step between the kernel's cells.
        act: whether a GELU follows.
        bias: of the convolution.
        momentum: of the batch norm's running statistics.
        gain: first value of the batch norm's weight; 0 makes a residual branch begin as nothing.
        std: of the first weights; None: He's, or Xavier's where depthwise.
    """

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
        super().__init__()
        conv: type[nn.Conv1d | nn.Conv2d] = nn.Conv2d if axes == 2 else nn.Conv1d
        self.conv: nn.Conv1d | nn.Conv2d = conv(
            in_dim,
            dim,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=dim if depthwise else 1,
            bias=bias,
        )
        self.norm: nn.Module = batch_norm(dim, axes, momentum, gain)
        if act:
            self.act = nn.GELU()
        if depthwise:
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            truncated_normal(self.conv.weight, (2 / in_dim) ** 0.5 if std is None else std)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def fold(self) -> None:
        """For deployment: a map's norm goes into its convolution."""
        if isinstance(self.conv, nn.Conv2d) and isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = fold_norm_after(self.conv, self.norm), nn.Identity()


def batch_norm(dim: int, axes: int, momentum: float, gain: float = 1.0) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """Batch norm as everywhere in these decoders."""
    norm = (nn.BatchNorm2d if axes == 2 else nn.BatchNorm1d)(dim, eps=BN_EPS, momentum=momentum)
    nn.init.constant_(norm.weight, gain)
    return norm


def truncated_normal(weight: Tensor, std: float) -> None:
    """Normal values within two standard deviations, in place."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear; corners are aligned where the map is 2^k n + 1 wide, which the oddness of w tells."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=x.shape[-1] % 2 == 1)
