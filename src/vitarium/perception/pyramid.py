"""Pyramids of maps from any backbone by name, ours or timm's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitarium.catalog.create import create_model
from vitarium.errors import UsageError


def create_pyramid(name: str, arguments: Mapping[str, Any] | None = None, *, levels: int = 4, in_chans: int = 3) -> nn.Module:
    """Create a backbone without its head, for `feature_maps`.

    Args:
        name: as for `create_model`: "convnext_tiny", "timm/resnet50"...
        arguments: arguments of its constructor.
        levels: number of maps.
        in_chans: number of channels of the image.

    Raises:
        UsageError: unknown backbone, or one with fewer maps.
    """
    backbone = create_model(name, num_classes=0, in_chans=in_chans, **dict(arguments or {}))
    if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "feature_info"):
        raise UsageError(f"{name} returns no maps of its stages; use a pyramid such as convnext_tiny, swin_tiny or timm/resnet50")
    dims, strides = feature_dims(backbone, levels), feature_strides(backbone, levels)
    if len(dims) < levels or any(b <= a for a, b in itertools.pairwise(strides)):
        raise UsageError(f"{name} has maps of strides {strides}; {levels} maps of increasing stride are needed")
    for part in ("norm", "head_norm"):  # used only for classification
        if isinstance(getattr(backbone, part, None), nn.Module):
            setattr(backbone, part, nn.Identity())
    return backbone


def _info(backbone: nn.Module, levels: int) -> list[Any]:
    info: Any = backbone.feature_info
    return [info[i] for i in range(len(info))][-levels:]


def feature_dims(backbone: nn.Module, levels: int = 4) -> list[int]:
    """Return the channels of the last `levels` maps, from fine to coarse."""
    return [int(level["num_chs"]) for level in _info(backbone, levels)]


def feature_strides(backbone: nn.Module, levels: int = 4) -> list[int]:
    """Return the strides, pixels per cell, of the last `levels` maps, from fine to coarse."""
    return [int(level["reduction"]) for level in _info(backbone, levels)]


def feature_maps(backbone: nn.Module, image: Tensor, levels: int = 4) -> list[Tensor]:
    """Return the last maps of an image (B, in_chans, H, W), fine to coarse, (B, C_i, H / stride_i, W / stride_i) each, before any norm."""
    intermediates: Any = backbone.forward_intermediates
    return list(intermediates(image, indices=levels, intermediates_only=True))


def same_batch_norm(module: nn.Module, *, eps: float, momentum: float) -> None:
    """Set momentum and epsilon of all batch norms in `module`, in place; segmentation codebases change those of their backbones."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eps, part.momentum = eps, momentum
