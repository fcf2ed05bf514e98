"""Visual Attention Network: features multiplied by the output of a large kernel (Guo et al., "Visual Attention Network", 2022).

The module has the long range and the input dependence of self-attention without a softmax over all pairs. A 21 x 21 kernel is decomposed
into a depth-wise 5 x 5, a dilated depth-wise 7 x 7 (dilation 3) and a 1 x 1 convolution; its output is one attention value per position and
channel.

    u = GELU(W_1 y);  a = W_a DW_7,dilation 3(DW_5(u));  A(y) = W_2 (u * a) + y      with y = BN(x)
    x <- x + s1 * A(BN(x));  x <- x + s2 * MLP(BN(x)), the MLP with a depth-wise 3 x 3 in its middle

Follows the authors' code (github Visual-Attention-Network/VAN-Classification); its checkpoints load by name. Left out of the authors'
constructor: the class of the last norms of the stages, a layer norm in all released models. A(y) adds the *normed* y inside the layer
scale, as in the released models. Fully convolutional: any image size.
Cost: linear in image area.

Speed: maps are channels-last in memory, so the 1 x 1 convolutions are matrix products that read them in place; `fuse()` folds the batch
norms into adjacent convolutions.

Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitarium.catalog import chain, family, part_of, rename
from vitarium.nn import (
    Backbone,
    Conv2d,
    ConvMlp,
    ConvNorm,
    DropPath,
    LayerNorm2d,
    PyramidStage,
    Stage,
    by_images,
    conv_norm_gelu,
    drop_path_rates,
    fold_norm_before,
    init_convs_by_fan_out,
    init_weights,
)
from vitarium.nn.pvt import pvt_rules

GATES = ("multiply", "sigmoid", "add")


class LargeKernelAttention(nn.Module):
    """Large kernel attention, a decomposed K x K kernel: (B, C, H, W) -> attention map of the same shape.

    Args:
        dim: channels.
        kernel_size: side K of the composed kernel.
        dilation: dilation d of the second convolution; the three have the sizes (2d - 1) x (2d - 1), ceil(K / d) x ceil(K / d) and 1 x 1.

    Raises:
        ValueError: ceil(K / d) is even.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int):
        super().__init__()
        near, far = 2 * dilation - 1, math.ceil(kernel_size / dilation)
        if far % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} with dilation={dilation} needs a kernel of even size {far}; choose others")
        self.conv0 = Conv2d(dim, dim, near, padding=near // 2, groups=dim)
        self.conv_spatial = Conv2d(dim, dim, far, padding=far // 2 * dilation, dilation=dilation, groups=dim)
        self.conv1 = Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv_spatial(self.conv0(x)))


class GatedAttention(nn.Module):
    """Attention unit, A(y) in the module's docstring: (B, C, H, W) -> the same shape.

    Args:
        gate: use of the attention map: "multiply" (the paper), "sigmoid" (multiply by its sigmoid), or "add".
        dim, kernel_size, dilation: see `LargeKernelAttention`.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int, gate: str):
        super().__init__()
        self.gate = gate
        self.proj_1: nn.Conv2d = Conv2d(dim, dim, 1)
        self.lka = LargeKernelAttention(dim, kernel_size, dilation)
        self.proj_2 = Conv2d(dim, dim, 1)

    def forward(self, y: Tensor) -> Tensor:
        return by_images(self, self._attend, y, 4 * y.shape[1])  # u, a and two maps between them

    def _attend(self, y: Tensor) -> Tensor:
        u = conv_norm_gelu(y, self.proj_1)
        a = self.lka(u)
        gated = u + a if self.gate == "add" else u * (a.sigmoid() if self.gate == "sigmoid" else a)
        return self.proj_2(gated) + y


class VANBlock(nn.Module):
    """VAN block: (B, C, H, W) -> the same shape, channels-last in memory."""

    def __init__(
        self, dim: int, mlp_ratio: float, kernel_size: int, dilation: int, gate: str, layer_scale: float, drop: float, drop_path: float
    ):
        super().__init__()
        self.norm1: nn.Module = nn.BatchNorm2d(dim)
        self.attn = GatedAttention(dim, kernel_size, dilation, gate)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), drop)
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))

    def fold(self) -> None:
        """Fold the second norm into the MLP; the first stays, because its output is also added back."""
        if isinstance(self.norm2, nn.BatchNorm2d):
            self.mlp.fc1, self.norm2 = fold_norm_before(self.norm2, self.mlp.fc1), nn.Identity()


class ConvPatchEmbed(ConvNorm):
    """Overlapping patch embedding with a batch norm: (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    names = ("proj", "norm")


OFFICIAL = chain(
    part_of("backbone."),  # of a detector or segmenter
    rename(*pvt_rules(4, (r"attn\.spatial_gating_unit\.", "attn.lka."))),
)
_STAGE = r"^(?:van\.)?encoder\.stages\.(\d+)\."
TRANSFORMERS = chain(
    rename(
        (_STAGE + r"embeddings\.convolution\.", r"stages.\1.downsample.proj."),
        (_STAGE + r"embeddings\.normalization\.", r"stages.\1.downsample.norm."),
        (_STAGE + r"normalization\.", r"stages.\1.norm."),
        (_STAGE + r"layers\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^(?:van\.)?layernorm\.", None),  # in the files, unused
        (r"^classifier\.", "head."),
    ),
    rename(
        (r"\.pre_normomalization\.", ".norm1."),  # spelt so in its files
        (r"\.post_normalization\.", ".norm2."),
        (r"\.attention_scaling\.weight$", ".layer_scale_1"),
        (r"\.mlp_scaling\.weight$", ".layer_scale_2"),
        (r"\.attention\.pre_projection\.conv\.", ".attn.proj_1."),
        (r"\.attention\.post_projection\.", ".attn.proj_2."),
        (r"\.attention\.attention_layer\.attention\.depth_wise\.", ".attn.lka.conv0."),
        (r"\.attention\.attention_layer\.attention\.depth_wise_dilated\.", ".attn.lka.conv_spatial."),
        (r"\.attention\.attention_layer\.attention\.point_wise\.", ".attn.lka.conv1."),
        (r"\.mlp\.in_dense\.", ".mlp.fc1."),
        (r"\.mlp\.depth_wise\.", ".mlp.dwconv."),
        (r"\.mlp\.out_dense\.", ".mlp.fc2."),
    ),
)
"""Renamer of the authors' files in the format of transformers, which has dropped its class since."""
_WIDE = dict(mlp_ratios=(8, 8, 4, 4))


@family(
    "van",
    variants={
        "pico": dict(depths=(2, 2), dims=(24, 48), mlp_ratios=(4, 4), patch_size=2, image_size=16),
        "b0": dict(depths=(3, 3, 5, 2), dims=(32, 64, 160, 256), drop_path_rate=0.1, **_WIDE),  # 4.1 M, 75.4 % top-1
        "b1": dict(depths=(2, 2, 4, 2), dims=(64, 128, 320, 512), drop_path_rate=0.1, **_WIDE),  # 13.9 M, 81.1 %
        "b2": dict(depths=(3, 3, 12, 3), dims=(64, 128, 320, 512), drop_path_rate=0.1, **_WIDE),  # 26.6 M, 82.8 %
        "b3": dict(depths=(3, 5, 27, 3), dims=(64, 128, 320, 512), drop_path_rate=0.2, **_WIDE),  # 44.8 M, 83.9 %
        "b4": dict(depths=(3, 6, 40, 3), dims=(64, 128, 320, 512), **_WIDE),  # 60.3 M
        "b5": dict(depths=(3, 3, 24, 3), dims=(96, 192, 480, 768), **_WIDE),  # 90.0 M
        "b6": dict(depths=(6, 6, 90, 6), dims=(96, 192, 384, 768), **_WIDE),  # 199.8 M
    },
    official=OFFICIAL,
    dialects={"transformers": TRANSFORMERS},
    crop_pct=0.9,
)
class VAN(Backbone):
    """VAN classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        mlp_ratios: ratio of the MLP's hidden channels to channels, per stage.
        patch_size: stride of the stem, pixels; its kernel is 2 * patch_size - 1.
        kernel_size, dilation: of the large kernel, see `LargeKernelAttention`.
        gate: see `GatedAttention`.
        layer_scale_init_value: initial value of the layer scales s1 and s2.
        norm_eps: epsilon of the layer norm after each stage; 1e-6 in all released models, 1e-5 by default in the authors' class.
        drop_rate: dropout in the MLPs and before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: depths, dims and mlp_ratios differ in length, an unknown gate, or a kernel that cannot be decomposed.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratios: Sequence[float],
        patch_size: int = 4,
        kernel_size: int = 21,
        dilation: int = 3,
        gate: str = "multiply",
        layer_scale_init_value: float = 1e-2,
        norm_eps: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(depths) == len(dims) == len(mlp_ratios):
            raise ValueError(f"depths, dims and mlp_ratios need one value per stage, got {depths}, {dims} and {mlp_ratios}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
        stages = [Stage(dim, patch_size * 2**k) for k, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            PyramidStage(
                ConvPatchEmbed(dims[k - 1], dims[k], 3, 2, bias=True)
                if k
                else ConvPatchEmbed(in_chans, dims[0], 2 * patch_size - 1, patch_size, bias=True),
                [
                    VANBlock(dims[k], mlp_ratios[k], kernel_size, dilation, gate, layer_scale_init_value, drop_rate, rate)
                    for rate in rates[k]
                ],
                LayerNorm2d(dims[k], eps=norm_eps),
            )
            for k in range(len(dims))
        )
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)

    @torch.no_grad()
    def attention_map(self, image: Tensor, stage: int = -1) -> Tensor:
        """Return the channel mean of the attention map of the last block of a stage, for visualisation: (B, in_chans, H, W) -> (B, h, w).

        Raises:
            InputError: no such stage.
        """
        number = self.take_indices([stage])[0]
        seen: list[Tensor] = []
        handle = self.stages[number].blocks[-1].attn.lka.register_forward_hook(lambda *call: seen.append(call[-1]))  # type: ignore[index,union-attr]
        try:
            self.forward_intermediates(image, [number], stop_early=True, intermediates_only=True)
        finally:
            handle.remove()
        return seen[0].mean(1)
