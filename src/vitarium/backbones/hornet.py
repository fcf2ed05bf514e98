"""HorNet: recursive gated convolutions for high-order spatial interactions (Rao et al., "HorNet", 2022).

The idea: attention is effective because features are multiplied by functions of other positions, and more than once. A recursive gated
convolution (gnConv) of order n performs n such products at about the cost of one convolution: channels are projected, one large depth-wise
convolution computes all gates, and each gate has twice the channels of the previous one.

    [p | q] = W_in x;  q = s DW(q);  z_0 = p * q_0;  z_k = (W_k z_{k-1}) * q_k;  gnConv(x) = W_out z_{n-1}
    x <- x + g1 * gnConv(LN(x));  x <- x + g2 * MLP(LN(x))

DW is 7 x 7. In the GF models, one half of the channels uses a 3 x 3 convolution and the other a learned filter in the Fourier domain.

Follows the authors' code (github raoyongming/HorNet); its checkpoints load by name, those of detectors and segmenters too
(`stage_norms`; only the backbone is read). Left out: settings of the initialisation (`uniform_init`, `head_init_scale`), and HorFPN, a neck
of detectors. Any image with at least one cell in the last stage;
Fourier filters are resized to the map.
Cost: linear in image area (7 x 7), or area times its logarithm (GF).

Speed: maps are channels-last in memory, so norms and linear layers read them in place.

Legend: B batch, C channels, H W map, n order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vitarium.catalog import family
from vitarium.catalog.dialects import CONVNEXT
from vitarium.nn import (
    Backbone,
    DropPath,
    LayerNorm2d,
    Mlp,
    PyramidStage,
    Stage,
    conv_patches,
    drop_path_rates,
    init_weights,
    layer_scale_gamma,
)
from vitarium.ops.spectral import global_filter


class GlobalLocalFilter(nn.Module):
    """Depth-wise 3 x 3 on one half of the channels and a global Fourier filter on the other, interleaved: (B, C, H, W) -> the same shape.

    Args:
        dim: channels C, even.
        size: rows h and columns w of the filter, which is that of a map of (h, 2 w - 2) or (h, 2 w - 1).

    Raises:
        ValueError: an odd number of channels.
    """

    def __init__(self, dim: int, size: tuple[int, int]):
        super().__init__()
        if dim % 2:
            raise ValueError(f"GlobalLocalFilter needs an even number of channels, got {dim}")
        self.pre_norm = LayerNorm2d(dim, eps=1e-6)
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, *size, 2))
        self.post_norm = LayerNorm2d(dim, eps=1e-6)
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.pre_norm(x).chunk(2, 1)
        both = torch.stack([self.dw(near), global_filter(far, self.complex_weight)], 2).flatten(1, 2)
        return self.post_norm(both)


class GnConv(nn.Module):
    """Recursive gated convolution (gnConv): (B, C, H, W) -> the same shape.

    Args:
        dim: channels C, a multiple of 2^(order - 1).
        order: number n of products.
        filter_size: size of a global filter in place of the 7 x 7 convolution; None for the latter.
        scale: factor s on the gates.

    Raises:
        ValueError: an order below 1, or channels that are not a multiple of 2^(order - 1).
    """

    def __init__(self, dim: int, order: int, filter_size: tuple[int, int] | None = None, scale: float = 1 / 3):
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(
                f"gnConv of order {order} needs an order of at least 1 and a multiple of {2 ** (max(1, order) - 1)} channels, got {dim}"
            )
        self.widths = [dim // 2**k for k in reversed(range(order))]
        self.scale = scale
        gates = sum(self.widths)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.dwconv = GlobalLocalFilter(gates, filter_size) if filter_size else nn.Conv2d(gates, gates, 7, padding=3, groups=gates)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:], strict=False))
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, gates = self.proj_in(x).split([self.widths[0], sum(self.widths)], 1)
        z, *others = (self.dwconv(gates) * self.scale).split(self.widths, 1)
        z = first * z
        for widen, gate in zip(self.pws, others, strict=True):
            z = widen(z) * gate
        return self.proj_out(z)


class HorNetBlock(nn.Module):
    """HorNet block: (B, C, H, W) -> the same shape, channels-last in memory.

    Args:
        dim, order, filter_size, scale: see `GnConv`.
        layer_scale: initial value of the factors g1 and g2; 0 for none.
        drop_path: stochastic depth rate of both branches.
    """

    def __init__(self, dim: int, order: int, filter_size: tuple[int, int] | None, scale: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.gnconv = GnConv(dim, order, filter_size, scale)
        self.gamma1 = layer_scale_gamma(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma2 = layer_scale_gamma(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.gnconv(self.norm1(x))
        x = x + self.drop_path(branch if self.gamma1 is None else self.gamma1[:, None, None] * branch)
        branch = self.mlp(self.norm2(x.permute(0, 2, 3, 1)))
        branch = branch if self.gamma2 is None else self.gamma2 * branch
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


DEPTHS, ORDERS = (2, 3, 18, 2), (2, 3, 4, 5)
FILTERS = (None, None, (14, 8), (7, 4))
"""Filter sizes of the GF models for images of 224 pixels."""
FILTERS_384 = (None, None, (24, 13), (12, 7))


def _variant(dim: int, filters: Sequence[tuple[int, int] | None] | None = None, **options: object) -> dict[str, object]:
    row = dict(depths=DEPTHS, dims=tuple(dim * 2**k for k in range(4)), orders=ORDERS, **options)
    return row | ({"filters": filters} if filters else {})


@family(
    "hornet",
    variants={
        "pico": dict(depths=(2, 2), dims=(24, 48), orders=(2, 3), patch_size=2, layer_scale_init_value=1.0, image_size=16),
        "tiny": _variant(64, drop_path_rate=0.2),  # 22.4 M, 82.8 % top-1
        "tiny_gf": _variant(64, FILTERS, drop_path_rate=0.2),  # 23 M, 83.0 %
        "small": _variant(96, drop_path_rate=0.4),  # 50 M, 83.8 %
        "small_gf": _variant(96, FILTERS, drop_path_rate=0.4),  # 50 M, 84.0 %
        "base": _variant(128, drop_path_rate=0.5),  # 87 M, 84.2 %
        "base_gf": _variant(128, FILTERS, drop_path_rate=0.5),  # 88 M, 84.3 %
        "base_gf_384": _variant(128, FILTERS_384, image_size=384),
        "large": _variant(192),  # 209 M, 22K weights
        "large_gf": _variant(192, FILTERS),  # 211 M
        "large_gf_384": _variant(192, FILTERS_384, image_size=384),  # 216 M
    },
    official=CONVNEXT,
)
class HorNet(Backbone):
    """HorNet classifier: images (B, in_chans, H, W), H and W at least the stride of the last stage (32), -> logits (B, num_classes).

    If a stride does not divide its map, the remainder at the right and the bottom is dropped, as in the authors' code.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        orders: order of the gnConvs, per stage.
        scale: factor s on the gates; 1/3 in all released models.
        filters: size of the global filters of each stage, None for 7 x 7 kernels; by default 7 x 7 in all stages.
        patch_size: side of the stem's patches, pixels.
        layer_scale_init_value: initial value of the factors g1 and g2; 0 for none.
        stage_norms: whether the map of each stage gets its own layer norm in place of the one after pooling, as in the authors' detectors
            and segmenters; the next stage reads the map before the norm.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, channels that do not fit the order, or a negative layer_scale_init_value.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        orders: Sequence[int],
        scale: float = 1 / 3,
        filters: Sequence[tuple[int, int] | None] | None = None,
        patch_size: int = 4,
        layer_scale_init_value: float = 1e-6,
        stage_norms: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        grids = list(filters) if filters is not None else [None] * len(dims)
        if not len(depths) == len(dims) == len(orders) == len(grids):
            raise ValueError(f"depths, dims, orders and filters need one value per stage, got {depths}, {dims}, {orders} and {filters}")
        strides = [patch_size * 2**k for k in range(len(dims))]
        stages = [Stage(dim, stride) for dim, stride in zip(dims, strides, strict=True)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=strides[-1])
        self.stem = conv_patches(in_chans, dims[0], patch_size, norm="after")
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            PyramidStage(
                conv_patches(dims[k - 1], dims[k], 2, norm="before") if k else nn.Identity(),
                [HorNetBlock(dims[k], orders[k], _pair(grids[k]), scale, layer_scale_init_value, rate) for rate in rates[k]],
            )
            for k in range(len(dims))
        )
        self.stage_norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6) if stage_norms else nn.Identity() for dim in dims)
        self.head_norm = nn.Identity() if stage_norms else nn.LayerNorm(dims[-1], eps=1e-6)
        init_weights(self)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        for x, norm in zip(super().forward_stages(image), self.stage_norms, strict=False):  # pruned models have fewer stages
            yield norm(x)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("complex_weight")}


def _pair(grid: Sequence[int] | None) -> tuple[int, int] | None:
    return None if grid is None else (grid[0], grid[1])
