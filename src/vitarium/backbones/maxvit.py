"""MaxViT: multi-axis attention, with a convolution, window attention and grid attention in every block (Tu et al., "MaxViT", 2022).

The idea: full attention is factorised into two sparse ones. Block attention works inside P x P windows, grid attention on G x G tokens
spread evenly over the map, so that every block has a global receptive field at a cost linear in area. An inverted bottleneck with
squeeze-and-excitation before them provides position information.

    x <- shortcut(x) + MBConv(x);  then twice, in windows and on the grid:  x <- x + Attention(LN(x));  x <- x + MLP(LN(x))

Follows the authors' TensorFlow code (github google-research/maxvit) in timm's port, whose checkpoints load by name: "same" padding, the
tanh approximation of GELU, bias tables of key minus query. Any image size: maps are padded for the attentions, and padding is masked (the
authors' code refuses sizes that are not divisible; for the others the results are equal). Left out of the authors' configuration, since no
released model uses them: bias tables that all heads share or none, other activations, downsampling before the convolution or by maxima,
MBConv without expansion, and dropout inside the blocks.
Cost: linear in image area at fixed P and G.

Speed: tokens are permuted to window order, from there to grid order, and back to a map once per block; biases are gathered once in
evaluation mode; `fuse()` folds all batch norms into their convolutions, whose kernels then apply the GELUs; on a CPU the convolutions
process a few images at a time, so that their four times wider maps stay in the cache.

Legend: B batch, C channels, H W map, N tokens of the padded map.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import (
    Backbone,
    Conv2d,
    DropPath,
    LayoutCache,
    Mlp,
    PyramidStage,
    SqueezeExcite,
    Stage,
    WindowAttention,
    by_images,
    conv_norm_gelu,
    fold_norm_before,
    fold_pair,
    init_weights,
)
from vitarium.nn.positions import BILINEAR, resize_bias_table
from vitarium.ops.convolution import conv2d
from vitarium.ops.linear import Gelu
from vitarium.ops.windows import WindowLayout, attention_layout, pad_to_multiple

GELU = functools.partial(nn.GELU, "tanh")
PARTITIONS = ("window", "grid")


def batch_norm(dim: int) -> nn.BatchNorm2d:
    """Return a batch norm with the authors' epsilon and momentum."""
    return nn.BatchNorm2d(dim, eps=1e-3, momentum=0.01)


class Conv2dSame(Conv2d):
    """Convolution with TensorFlow's "SAME" padding: ceil(side / stride) outputs; an odd row or column of zeros is added bottom or right."""

    def forward(self, x: Tensor, gelu: Gelu | None = None) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, columns % 2, 0, rows % 2))
        around = (rows // 2, columns // 2)  # padded by the kernel: a padded copy of a wide map takes as long as the convolution
        return conv2d(x, self.weight, self.bias, stride=(stride, stride), padding=around, groups=self.groups, gelu=gelu)


class Shortcut(nn.Module):
    """Shortcut of a block that changes resolution or channels: average pooling, and a 1 x 1 convolution if the channels change."""

    def __init__(self, in_dim: int, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.expand = Conv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return self.expand(x)


class MBConv(nn.Module):
    """Pre-norm inverted bottleneck: (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_dim: int, dim: int, stride: int, *, expand_ratio: float, se_ratio: float, kernel_size: int, drop_path: float):
        super().__init__()
        self.hidden_dim = hidden = int(expand_ratio * dim)
        self.shortcut = Shortcut(in_dim, dim, stride)
        self.pre_norm: nn.Module = batch_norm(in_dim)
        self.conv1_1x1: nn.Conv2d = Conv2d(in_dim, hidden, 1, bias=False)
        self.norm1: nn.Module = batch_norm(hidden)
        self.conv2_kxk: nn.Conv2d = Conv2dSame(hidden, hidden, kernel_size, stride, groups=hidden, bias=False)
        self.norm2: nn.Module = batch_norm(hidden)
        self.se = SqueezeExcite(hidden, max(1, int(se_ratio * dim))) if se_ratio else nn.Identity()
        self.conv3_1x1 = Conv2d(hidden, dim, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, self._bottleneck, x, self.hidden_dim)

    def _bottleneck(self, x: Tensor) -> Tensor:
        y = conv_norm_gelu(self.pre_norm(x), self.conv1_1x1, self.norm1, "tanh")
        y = conv_norm_gelu(y, self.conv2_kxk, self.norm2, "tanh")
        return self.shortcut(x) + self.drop_path(self.conv3_1x1(self.se(y)))

    def fold(self) -> None:
        """Fold the three norms into adjacent convolutions."""
        if isinstance(self.pre_norm, nn.BatchNorm2d):
            self.conv1_1x1, self.pre_norm = fold_norm_before(self.pre_norm, self.conv1_1x1), nn.Identity()
        fold_pair(self, "conv1_1x1", "norm1")
        fold_pair(self, "conv2_kxk", "norm2")


class PartitionAttention(nn.Module):
    """Attention and MLP on tokens in the order of a partition: (B, N, C) -> the same shape."""

    def __init__(self, dim: int, size: int, drop_path: float, *, head_dim: int = 32, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, dim // head_dim, size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), GELU)  # type: ignore[arg-type]  # a partial class
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), layout))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MaxViTBlock(nn.Module):
    """MaxViT block: (B, C_in, H, W) -> (B, C, H', W').

    Args:
        in_dim, dim: channels before and after, dim a multiple of head_dim.
        stride: of the convolution.
        sizes: sides of windows and of grids, tokens.
        partitions: "window" or "grid" for each of the two attentions.
        head_dim, mlp_ratio: of the attentions and their MLPs.
        drop_path: stochastic depth rate of all five branches.
        conv: expand_ratio, se_ratio and kernel_size of the convolution.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        *,
        sizes: tuple[int, int],
        partitions: Sequence[str],
        head_dim: int,
        mlp_ratio: float,
        drop_path: float,
        **conv: Any,
    ):
        super().__init__()
        self.grids = [partition == "grid" for partition in partitions]
        self.sizes = [sizes[grid] for grid in self.grids]
        self.conv = MBConv(in_dim, dim, stride, drop_path=drop_path, **conv)
        self.attn_block, self.attn_grid = (
            PartitionAttention(dim, size, drop_path, head_dim=head_dim, mlp_ratio=mlp_ratio) for size in self.sizes
        )
        self.kept = LayoutCache()

    def layouts(self, height: int, width: int, device: torch.device) -> tuple[WindowLayout, WindowLayout]:
        """Return the layouts of the two attentions for a map."""
        one = lambda i: attention_layout(height, width, self.sizes[i], grid=self.grids[i], device=device)
        return self.kept.get(height, width, device, lambda: (one(0), one(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        height, width = x.shape[-2:]
        first, second = self.layouts(height, width, x.device)
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.sizes[0])
        padded = x.shape
        x = self.attn_block(x.flatten(1, 2).index_select(1, first.order), first)
        if self.sizes[0] == self.sizes[1]:
            x = self.attn_grid(x.index_select(1, first.inverse[second.order]), second)
        else:  # maps padded to different sizes
            x = x.index_select(1, first.inverse).view(padded)[:, :height, :width]
            x = pad_to_multiple(x, self.sizes[1])
            padded = x.shape
            x = self.attn_grid(x.flatten(1, 2).index_select(1, second.order), second)
        return x.index_select(1, second.inverse).view(padded)[:, :height, :width].permute(0, 3, 1, 2)


class Stem(nn.Module):
    """Two convolutions of side `kernel_size`, the first with stride 2: (B, in_chans, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int):
        super().__init__()
        self.dim = dim
        self.conv1: nn.Conv2d = Conv2dSame(in_chans, dim, kernel_size, 2)
        self.norm1: nn.Module = batch_norm(dim)
        self.conv2 = Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, lambda x: self.conv2(conv_norm_gelu(x, self.conv1, self.norm1, "tanh")), x, self.dim // 4)

    def fold(self) -> None:
        """Fold the norm into the first convolution."""
        fold_pair(self, "conv1", "norm1")


class PreLogits(nn.Module):
    """Norm, and with `hidden` a linear layer and tanh, before the head: (B, C) -> the same shape."""

    def __init__(self, dim: int, hidden: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x if self.fc is None else torch.tanh(self.fc(x))


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's port of the authors' checkpoints, whose bias tables are (heads, 2P - 1, 2P - 1), indexed by key minus query."""
    renamed = rename(
        (r"\.attn\.rel_pos\.relative_position_index$", None),
        (r"\.attn\.rel_pos\.relative_position_bias_table$", ".attn.position_bias.table"),
        (r"^head\.norm\.", "head_norm.norm."),
        (r"^head\.pre_logits\.fc\.", "head_norm.fc."),
        (r"^head\.fc\.", "head."),
    )(state)
    is_table = lambda name, t: name.endswith(".position_bias.table") and t.ndim == 3
    return {name: t.flip(1, 2).flatten(1).T.contiguous() if is_table(name, t) else t for name, t in renamed.items()}


def _rows(name: str, depths: Sequence[int], dim: int, stem: int, rate: float) -> dict[str, dict[str, Any]]:
    """Return the variants of a model at the three image sizes of its releases."""
    row = dict(depths=depths, dims=tuple(dim * 2**k for k in range(4)), stem_dim=stem, drop_path_rate=rate)
    sizes = {f"{name}_{size}": dict(**row, window_size=size // 32, image_size=size) for size in (384, 512)}
    return {name: row, **sizes}


def _tags(size: str) -> dict[str, dict[str, tuple[str, ...]]]:
    tags = ("in1k",) if size in ("tiny", "small") else ("in1k", "in21k_ft_in1k")
    small: dict[str, tuple[str, ...]] = {"in1k": (f"timm:maxvit_{size}_tf_224.in1k",)}
    return {size: small, **{f"{size}_{n}": {tag: (f"timm:maxvit_{size}_tf_{n}.{tag}",) for tag in tags} for n in (384, 512)}}


@family(
    "maxvit",
    variants={
        "pico": dict(depths=(1, 1), dims=(32, 64), stem_dim=16, strides=(1, 2), window_size=4, image_size=16),
        **_rows("tiny", (2, 2, 5, 2), 64, 64, 0.2),  # 30.9 M, 83.6 % top-1 at 224
        **_rows("small", (2, 2, 5, 2), 96, 64, 0.3),  # 69 M, 84.5 %
        **_rows("base", (2, 6, 14, 2), 96, 64, 0.4),  # 119 M, 84.9 %
        **_rows("large", (2, 6, 14, 2), 128, 128, 0.6),  # 212 M, 85.2 %
        **_rows("xlarge", (2, 6, 14, 2), 192, 192, 0.6),  # 475 M, from 21K
    },
    official=official,
    weights={**_tags("tiny"), **_tags("small"), **_tags("base"), **_tags("large")}
    | {f"xlarge_{n}": {"in21k_ft_in1k": (f"timm:maxvit_xlarge_tf_{n}.in21k_ft_in1k",)} for n in (384, 512)},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=0.95,
)
class MaxViT(Backbone):
    """MaxViT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        depths, dims: blocks and channels per stage; channels are multiples of head_dim.
        stem_dim: channels of the stem, which has stride 2.
        strides: stride of each stage.
        window_size: side P of windows, tokens; 1/32 of the side of the image in the released models.
        grid_size: side G of grids, tokens; None: window_size.
        partitions: "window" or "grid" for each of the two attentions of a block.
        head_dim: channels per head.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels.
        expand_ratio, se_ratio: ratio of the channels inside the convolution (MBConv), and inside its squeeze-and-excitation, to the
            channels; se_ratio 0 for no squeeze-and-excitation.
        kernel_size: side of the kernels of stem and MBConv, odd.
        pre_logits: whether a linear layer and tanh follow the norm before the head.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth: block b of D has the rate b / D times this.

    Raises:
        ValueError: lists of different lengths, channels that are not a multiple of head_dim, an even kernel_size, or other partitions.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        stem_dim: int = 64,
        strides: Sequence[int] = (2, 2, 2, 2),
        window_size: int = 7,
        grid_size: int | None = None,
        partitions: Sequence[str] = PARTITIONS,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        expand_ratio: float = 4.0,
        se_ratio: float = 0.25,
        kernel_size: int = 3,
        pre_logits: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(depths) == len(dims) == len(strides):
            raise ValueError(f"depths, dims and strides need one value per stage, got {depths}, {dims} and {strides}")
        if wrong := [dim for dim in dims if dim % head_dim]:
            raise ValueError(f"dims must be multiples of {head_dim}, the width of a head, got {wrong[0]}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if len(partitions) != 2 or not set(partitions) <= set(PARTITIONS):
            raise ValueError(f"partitions must be two of {', '.join(PARTITIONS)}, got {partitions}")
        reductions = [2 * int(torch.Size(strides[: k + 1]).numel()) for k in range(len(dims))]
        stages = [Stage(dim, reduction) for dim, reduction in zip(dims, reductions, strict=True)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.stem = Stem(in_chans, stem_dim, kernel_size)
        options: dict[str, Any] = dict(sizes=(window_size, grid_size or window_size), partitions=partitions, head_dim=head_dim)
        options |= dict(mlp_ratio=mlp_ratio, expand_ratio=expand_ratio, se_ratio=se_ratio, kernel_size=kernel_size)
        total, number, before = sum(depths), 0, stem_dim
        built = []
        for depth, dim, stride in zip(depths, dims, strides, strict=True):
            blocks = []
            for i in range(depth):
                rate = drop_path_rate * number / total
                blocks.append(MaxViTBlock(before, dim, 1 if i else stride, drop_path=rate, **options))
                number, before = number + 1, dim
            built.append(PyramidStage(nn.Identity(), blocks))
        self.stages = nn.ModuleList(built)
        self.head_norm = PreLogits(dims[-1], pre_logits)
        init_weights(self)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a bias table of a checkpoint to the windows of this model, bilinear; return None for any other tensor."""
        if not name.endswith("position_bias.table") or tensor.shape[1:] != shape[1:]:
            return None
        return resize_bias_table(tensor, shape[0], rule=BILINEAR)
