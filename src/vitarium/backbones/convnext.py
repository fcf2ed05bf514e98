"""ConvNeXt: a ResNet modernised with the design of Swin, without attention (Liu et al., "A ConvNet for the 2020s", 2022).

The idea: a patch stem, stages in the ratio 1:1:3:1, and one type of block: a large depth-wise convolution for spatial mixing and an
inverted bottleneck for channel mixing, with one norm and one activation.

    x <- x + gamma * MLP(LN(DWConv_7x7(x)))

The isotropic form has one resolution, as a ViT, and no layer scale.

Follows the authors' code (github facebookresearch/ConvNeXt); its checkpoints load by name: classifiers, and detectors and segmenters
(`stage_norms`; only the backbone is read). Left out: their names in detectron2, which no released file has; ConvNeXt V2, another model.
Cost: linear in image area.

Speed: maps are channels-last in memory, so the norm and the two linear layers read them in place.

Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog import chain, family, rename
from vitarium.catalog.dialects import CONVNEXT, CONVNEXT_MLP
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


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block: (B, C, H, W) -> the same shape, channels-last in memory.

    Args:
        dim: channels C.
        kernel_size: side of the depth-wise kernel, odd.
        mlp_ratio: ratio of the MLP's hidden channels to C.
        layer_scale: initial value of gamma; 0 for no gamma.
        drop_path: stochastic depth rate.
    """

    def __init__(self, dim: int, kernel_size: int, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.gamma = layer_scale_gamma(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        if self.gamma is not None:
            branch = branch * self.gamma
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


TIMM = rename(
    (r"^stem\.0\.", "stem.conv."),
    (r"^stem\.1\.", "stem.norm."),
    (r"\.downsample\.0\.", ".downsample.norm."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"^head\.norm\.", "head_norm."),
    (r"^head\.fc\.", "head."),
)


def _torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's tensors and flatten its gamma, which has the shape (C, 1, 1)."""
    flat = {name: tensor.flatten() if name.endswith("layer_scale") else tensor for name, tensor in state.items()}
    stage = [
        rule
        for k in range(4)
        for rule in (
            (rf"^features\.{2 * k}\.0\.", f"stages.{k}.downsample.norm."),
            (rf"^features\.{2 * k}\.1\.", f"stages.{k}.downsample.conv."),
            (rf"^features\.{2 * k + 1}\.(\d+)\.layer_scale$", rf"stages.{k}.blocks.\1.gamma"),
            (rf"^features\.{2 * k + 1}\.(\d+)\.block\.0\.", rf"stages.{k}.blocks.\1.dwconv."),
            (rf"^features\.{2 * k + 1}\.(\d+)\.block\.2\.", rf"stages.{k}.blocks.\1.norm."),
            (rf"^features\.{2 * k + 1}\.(\d+)\.block\.3\.", rf"stages.{k}.blocks.\1.mlp.fc1."),
            (rf"^features\.{2 * k + 1}\.(\d+)\.block\.5\.", rf"stages.{k}.blocks.\1.mlp.fc2."),
        )
    ]
    stem = ((r"^features\.0\.0\.", "stem.conv."), (r"^features\.0\.1\.", "stem.norm."))
    head = ((r"^classifier\.0\.", "head_norm."), (r"^classifier\.2\.", "head."))
    return rename(*stem, *stage, *head)(flat)


_STAGE = r"^(?:convnext\.)?encoder\.stages\.(\d+)\."
TRANSFORMERS = chain(
    rename(
        (r"^(?:convnext\.)?embeddings\.patch_embeddings\.", "stem.conv."),
        (r"^(?:convnext\.)?embeddings\.layernorm\.", "stem.norm."),
        (_STAGE + r"downsampling_layer\.0\.", r"stages.\1.downsample.norm."),
        (_STAGE + r"downsampling_layer\.1\.", r"stages.\1.downsample.conv."),
        (_STAGE + r"layers\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^(?:convnext\.)?layernorm\.", "head_norm."),
        (r"^classifier\.", "head."),
    ),
    rename((r"\.layer_scale_parameter$", ".gamma"), (r"\.layernorm\.", ".norm."), *CONVNEXT_MLP),
)


def _tags(timm_name: str, *tags: str, hf: str = "") -> dict[str, tuple[str, ...]]:
    """Return tag -> sources; timm's table also contains the addresses of the authors' releases."""
    return {tag: (f"timm:{timm_name}.fb_{tag}", *((f"hf:facebook/{hf}",) if hf and not i else ())) for i, tag in enumerate(tags)}


@family(
    "convnext",
    variants={
        "pico": dict(depths=(2, 2), dims=(32, 64), patch_size=2, layer_scale_init_value=1.0, image_size=16),
        "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),  # 28.6 M, 82.1 % top-1
        "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),  # 50 M, 83.1 %
        "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),  # 89 M, 83.8 %
        "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),  # 198 M, 84.3 %
        "xlarge": dict(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048)),  # 350 M, 87.0 % from 22K
    },
    official=CONVNEXT,
    dialects={"timm": TIMM, "torchvision": _torchvision, "transformers": TRANSFORMERS},
    weights={
        "tiny": _tags("convnext_tiny", "in1k", "in22k", "in22k_ft_in1k", "in22k_ft_in1k_384", hf="convnext-tiny-224"),
        "small": _tags("convnext_small", "in1k", "in22k", "in22k_ft_in1k", "in22k_ft_in1k_384", hf="convnext-small-224"),
        "base": _tags("convnext_base", "in1k", "in22k", "in22k_ft_in1k", "in22k_ft_in1k_384", hf="convnext-base-224"),
        "large": _tags("convnext_large", "in1k", "in22k", "in22k_ft_in1k", "in22k_ft_in1k_384", hf="convnext-large-224"),
        "xlarge": _tags("convnext_xlarge", "in22k_ft_in1k", "in22k", "in22k_ft_in1k_384", hf="convnext-xlarge-224-22k-1k"),
    },
)
class ConvNeXt(Backbone):
    """ConvNeXt classifier: images (B, in_chans, H, W), H and W at least the stride of the last stage (32), -> logits (B, num_classes).

    If a stride does not divide its map, the remainder at the right and the bottom is dropped, as in the authors' code.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        kernel_size: side of the depth-wise kernels, odd.
        patch_size: side of the stem's patches, pixels.
        mlp_ratio: ratio of a block's hidden channels to its channels.
        layer_scale_init_value: initial value of gamma; 0 for no gamma.
        head_init_scale: factor on the initial weights of the head (0.001 to fine-tune from 22K).
        stage_norms: whether the map of each stage gets its own layer norm in place of the one after pooling, as in the authors' detectors
            and segmenters; the next stage reads the map before the norm.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: depths and dims differ in length, an even kernel_size, or a negative layer_scale_init_value.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_size: int = 7,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        stage_norms: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims need one value per stage, got {depths} and {dims}")
        _check_kernel(kernel_size)
        strides = [patch_size * 2**k for k in range(len(dims))]
        stages = [Stage(dim, stride) for dim, stride in zip(dims, strides, strict=True)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=strides[-1])
        self.stem = conv_patches(in_chans, dims[0], patch_size, norm="after")
        self.stages = nn.ModuleList(
            PyramidStage(
                conv_patches(dims[k - 1], dim, 2, norm="before") if k else nn.Identity(),
                [ConvNeXtBlock(dim, kernel_size, mlp_ratio, layer_scale_init_value, rate) for rate in rates],
            )
            for k, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True))
        )
        self.stage_norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6) if stage_norms else nn.Identity() for dim in dims)
        self.head_norm = nn.Identity() if stage_norms else nn.LayerNorm(dims[-1], eps=1e-6)
        init_weights(self)
        _scale_head(self.head, head_init_scale)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        for x, norm in zip(super().forward_stages(image), self.stage_norms, strict=False):
            yield norm(x)

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return the authors' layer index (13 layers, stage 3 in groups of three blocks) as a function of a parameter's name."""

        def layer(name: str) -> int:
            stage = int(found[1]) if (found := re.match(r"stages\.(\d+)\.", name)) else None
            if stage is None:
                return 0 if name.startswith("stem.") else 13
            block = int(found[1]) if (found := re.search(r"\.blocks\.(\d+)\.", name)) else 0
            return (1, 2, 3 + block // 3, 12)[stage]

        return super().group_matcher(coarse=True) if coarse else layer


@family(
    "convnext",
    name="convnext_iso",
    variants={
        "pico": dict(dim=64, depth=4, patch_size=4, image_size=16),
        "small": dict(dim=384, depth=18),  # 22 M, 78.7 % top-1
        "base": dict(dim=768, depth=18),  # 87 M, 82.0 %
        "large": dict(dim=1024, depth=36, layer_scale_init_value=1e-6),  # 306 M, 82.6 %
    },
    official=chain(rename((r"^norm\.", "head_norm.")), rename(*CONVNEXT_MLP)),
)
class ConvNeXtIsotropic(Backbone):
    """Isotropic ConvNeXt classifier, with one resolution and width: images (B, in_chans, H, W) -> logits (B, num_classes).

    H and W must be at least patch_size.

    Args:
        dim: channels.
        depth: blocks.
        patch_size: side of the stem's patches, pixels; no norm follows the stem.

    The other arguments are those of `ConvNeXt`.

    Raises:
        ValueError: an even kernel_size.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        kernel_size: int = 7,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        layer_scale_init_value: float = 0.0,
        head_init_scale: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        _check_kernel(kernel_size)
        super().__init__(
            stages=[Stage(dim, patch_size)] * depth, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=patch_size
        )
        for i, info in enumerate(self.feature_info):
            info["module"] = f"blocks.{i}"
        self.stem = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, kernel_size, mlp_ratio, layer_scale_init_value, rate) for rate in rates)
        self.head_norm = nn.LayerNorm(dim, eps=1e-6)
        init_weights(self)
        _scale_head(self.head, head_init_scale)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = self.run_blocks([block], x)
            yield x


def _check_kernel(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd to keep the map size, got {kernel_size}; try {kernel_size + 1}")


def _scale_head(head: nn.Module, scale: float) -> None:
    if isinstance(head, nn.Linear):
        with torch.no_grad():
            head.weight.mul_(scale)
            head.bias.mul_(scale)
