"""TinyViT: a small pyramid designed for distillation during pretraining (Wu et al., "TinyViT", 2022).

Models of 5 to 21 million parameters use convolutions at high resolution (stem, one stage of inverted bottlenecks) and window attention at
low resolution, with a depth-wise 3 x 3 convolution between attention and MLP that connects the windows.

    x <- x + Attention(LN(x)) in M x M windows;  x <- BN(DW_3x3(x)), not residual;  x <- x + MLP(LN(x))

The position bias depends on the absolute offset (|dy|, |dx|) of two tokens. Maps are padded with zeros before the norm, so a padded token
equals the bias of the norm and is not masked.
Follows the authors' code (github microsoft/Cream, TinyViT) and timm's port; both checkpoints load by name ([q | k | v] per head is
reordered to [q | k | v] of all heads). Any image size. The other contribution of the paper, training on stored teacher logits, is the
learner `distillation` (vitarium.training.distillation), for any pair of models.
Left out: the learning rate per block, which is a setting of the recipe here; values wider than queries, which the authors' model never asks
of its attention.
Cost: linear in image area at fixed M.

Speed: maps and tokens share their memory (channels-last); biases are gathered once in evaluation mode; `fuse()` folds all batch norms, and
the kernels of the convolutions then apply the GELUs; on a CPU the convolutions process a few images at a time.

Legend: B batch, C channels, H W map, M window side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import chain, family, rename
from vitarium.nn import (
    Backbone,
    ConvNorm,
    DropPath,
    LayoutCache,
    Mlp,
    PyramidStage,
    Stage,
    WindowAttention,
    by_images,
    drop_path_rates,
    init_weights,
)
from vitarium.nn.positions import PLAIN
from vitarium.ops.windows import WindowLayout, pad_to_multiple, window_layout


class Stem(nn.Module):
    """Stem of two 3 x 3 convolutions: (B, in_chans, H, W) -> (B, dim, h, w)."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int]):
        super().__init__()
        self.dim = dim
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, strides[0])
        self.conv2 = ConvNorm(dim // 2, dim, 3, strides[1])

    def forward(self, image: Tensor) -> Tensor:
        return by_images(self, lambda x: self.conv2(self.conv1.activated(x)), image, self.dim // 8)


class MBConv(nn.Module):
    """Inverted bottleneck with an activation after the residual sum: (B, dim, H, W) -> the same shape."""

    def __init__(self, dim: int, hidden_dim: int, drop_path: float):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.conv1 = ConvNorm(dim, hidden_dim)
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, 3, groups=hidden_dim)
        self.conv3 = ConvNorm(hidden_dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, self._bottleneck, x, self.hidden_dim)

    def _bottleneck(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.drop_path(self.conv3(self.conv2.activated(self.conv1.activated(x)))))


class Downsample(nn.Module):
    """Downsampling by an inverted bottleneck: (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.conv1 = ConvNorm(in_dim, dim)
        self.conv2 = ConvNorm(dim, dim, 3, 2, groups=dim)
        self.conv3 = ConvNorm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, lambda x: self.conv3(self.conv2.activated(self.conv1.activated(x))), x, self.dim)


class DistanceBias(nn.Module):
    """Position bias per head and absolute offset in rows and columns: M -> (heads, n, n), n = M * M. Source: LeViT."""

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.table = nn.Parameter(torch.zeros(num_heads, window_size**2))

    def forward(self, size: int) -> Tensor:
        place = torch.arange(size, device=self.table.device)
        apart = (place[:, None] - place).abs()
        index = apart[:, None, :, None] * self.window_size + apart[None, :, None, :]
        return self.table[:, index.flatten()].view(len(self.table), size**2, size**2)


class TinyViTBlock(nn.Module):
    """TinyViT block with window attention: (B, H, W, dim) -> the same shape."""

    def __init__(self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path: float, local_conv_size: int):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, DistanceBias(window_size, num_heads))
        self.local_conv = ConvNorm(dim, dim, local_conv_size, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        height, width = x.shape[1:3]
        padded = pad_to_multiple(x, self.window_size)
        y = self.attn(self.norm1(padded.flatten(1, 2).index_select(1, layout.order)), layout)
        y = y.index_select(1, layout.inverse).view(padded.shape)[:, :height, :width]
        x = x + self.drop_path(y)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TinyViTStage(nn.Module):
    """Downsampling and attention blocks: (B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window_size: int):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.window_size = window_size
        self.kept = LayoutCache()

    def layout(self, height: int, width: int, device: torch.device) -> WindowLayout:
        """Return the window layout of a map."""
        return self.kept.get(height, width, device, lambda: window_layout(height, width, self.window_size, (0, 0), device))

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        return run(self.blocks, x, self.layout(x.shape[1], x.shape[2], x.device)).permute(0, 3, 1, 2)


def all_heads_together(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reorder the rows of qkv from (heads, 3, d) to (3, heads, d); the number of heads is read from the bias table."""
    state = dict(state)
    for name, table in list(state.items()):
        if not name.endswith(".position_bias.table"):
            continue
        for part in ("weight", "bias"):
            qkv = state.get(key := name.replace("position_bias.table", f"qkv.{part}"))
            if qkv is not None:
                rows = qkv.view(len(table), 3, qkv.shape[0] // (3 * len(table)), *qkv.shape[1:])
                state[key] = rows.transpose(0, 1).reshape(qkv.shape)
    return state


def _dialect(*rules: tuple[str, str | None]):
    """Build a converter for a dialect: `rules`, then what the authors' and timm's checkpoints share (norms inside attention and MLP)."""
    return chain(
        rename((r"attention_bias_idxs$", None), *rules),
        rename(
            (r"\.attn\.attention_biases$", ".attn.position_bias.table"),
            (r"\.attn\.norm\.", ".norm1."),
            (r"\.mlp\.norm\.", ".norm2."),
        ),
        all_heads_together,
    )


OFFICIAL = _dialect(
    (r"^patch_embed\.seq\.0\.c\.", "patch_embed.conv1.conv."),
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.c\.", "patch_embed.conv2.conv."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    *(
        rule
        for k in range(3)
        for rule in (
            (rf"^layers\.{k}\.downsample\.(conv\d)\.c\.", rf"stages.{k + 1}.downsample.\1.conv."),
            (rf"^layers\.{k}\.downsample\.", f"stages.{k + 1}.downsample."),
        )
    ),
    (r"^layers\.(.*)\.c\.", r"stages.\1.conv."),
    (r"^layers\.", "stages."),
    (r"^norm_head\.", "head_norm."),
)
TIMM = _dialect((r"^head\.norm\.", "head_norm."), (r"^head\.fc\.", "head."))
_21 = dict(dims=(96, 192, 384, 576), drop_path_rate=0.2)
_TAGS = ("dist_in22k_ft_in1k", "in1k", "dist_in22k")


@family(
    "tinyvit",
    variants={
        "pico": dict(dims=(16, 32, 64), depths=(1, 2, 2), window_sizes=(4, 4), head_dim=16, stem_strides=(1, 1), image_size=16),
        "micro": dict(dims=(16, 32, 64), depths=(1, 2, 2), window_sizes=(7, 4), head_dim=16, stem_strides=(2, 1), image_size=28),
        "5m": dict(dims=(64, 128, 160, 320)),  # 5.4 M, 79.1 % top-1, 80.7 % from 22K
        "11m": dict(dims=(64, 128, 256, 448), drop_path_rate=0.1),  # 11.0 M, 81.5 %, 83.2 %
        "21m": _21,  # 21.2 M, 83.1 %, 84.8 %
        "21m_384": dict(**_21, window_sizes=(12, 24, 12), image_size=384),  # 86.2 %
        "21m_512": dict(**_21, window_sizes=(16, 32, 16), image_size=512),  # 86.5 %
    },
    official=OFFICIAL,
    dialects={"timm": TIMM},
    weights={size: {tag: (f"timm:tiny_vit_{size}_224.{tag}",) for tag in _TAGS} for size in ("5m", "11m", "21m")}
    | {f"21m_{n}": {_TAGS[0]: (f"timm:tiny_vit_21m_{n}.{_TAGS[0]}",)} for n in (384, 512)},
    crop_pct=0.95,
)
class TinyViT(Backbone):
    """TinyViT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        dims, depths: channels and blocks per stage; the first stage is convolutional, the others use attention.
        window_sizes: side M of the windows of each stage with attention, tokens.
        head_dim: width of a head; must divide the channels of the stages with attention.
        num_heads: heads of each stage with attention, in place of head_dim.
        mlp_ratio: ratio of hidden channels to channels in MLPs.
        expand_ratio: the same in the bottlenecks of the first stage; None: mlp_ratio.
        local_conv_size: side of the depth-wise kernel between attention and MLP, odd.
        stem_strides: strides of the two convolutions of the stem.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, channels that are not divisible by head_dim or num_heads, or an even local_conv_size.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int] = (2, 2, 6, 2),
        window_sizes: Sequence[int] = (7, 14, 7),
        head_dim: int = 32,
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        expand_ratio: float | None = None,
        local_conv_size: int = 3,
        stem_strides: Sequence[int] = (2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(dims) == len(depths) == 1 + len(window_sizes):
            given = f"{dims}, {depths} and {window_sizes}"
            raise ValueError(f"dims and depths need one value per stage, window_sizes one fewer, got {given}")
        if num_heads is None:
            if wrong := [dim for dim in dims[1:] if dim % head_dim]:
                raise ValueError(f"dims must be divisible by head_dim={head_dim} from the second stage on, got {wrong[0]}")
            num_heads = [dim // head_dim for dim in dims[1:]]
        if len(num_heads) != len(window_sizes):
            raise ValueError(f"num_heads and window_sizes need one value per stage with attention, got {num_heads} and {window_sizes}")
        if local_conv_size % 2 == 0:
            raise ValueError(f"local_conv_size must be odd to keep the map size, got {local_conv_size}; try {local_conv_size + 1}")
        stages = [Stage(dim, stem_strides[0] * stem_strides[1] * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.patch_embed = Stem(in_chans, dims[0], stem_strides)
        rates = drop_path_rates(drop_path_rate, depths)
        hidden = int((mlp_ratio if expand_ratio is None else expand_ratio) * dims[0])
        first = PyramidStage(nn.Identity(), [MBConv(dims[0], hidden, rate) for rate in rates[0]])
        self.stages = nn.ModuleList(
            [
                first,
                *(
                    TinyViTStage(
                        Downsample(dims[k - 1], dims[k]),
                        [
                            TinyViTBlock(dims[k], num_heads[k - 1], window_sizes[k - 1], mlp_ratio, rate, local_conv_size)
                            for rate in rates[k]
                        ],
                        window_sizes[k - 1],
                    )
                    for k in range(1, len(dims))
                ),
            ]
        )
        self.head_norm = nn.LayerNorm(dims[-1])
        init_weights(self, conv=False)
        for block in first.blocks:
            nn.init.zeros_(block.conv3.bn.weight)  # type: ignore[union-attr,arg-type]

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(image.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("position_bias.table")}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a bias table of a checkpoint to the windows of this model, bicubic; return None for any other tensor."""
        if not name.endswith("position_bias.table") or tensor.shape[0] != shape[0]:
            return None
        old, new = (round(n**0.5) for n in (tensor.shape[1], shape[1]))
        return PLAIN(tensor.view(1, len(tensor), old, old), (new, new)).view(shape)
