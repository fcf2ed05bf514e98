"""A look at a model from outside: an input that it takes, and what one pass costs.

Methods prove themselves on such an input, and report costs with it; nothing here changes a model, its mode, or the random state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitarium.nn.modes import evaluating, frozen_parameters


def example_input(model: nn.Module, batch: int = 1) -> Tensor | None:
    """An image (batch, C, H, W) of the size, dtype and device that an image model says it takes; always the same one.

    None where the model says nothing of the kind (it has no `preprocessing`, timm configuration or transformers configuration).
    """
    shape = _input_shape(model)
    if shape is None:
        return None
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return image.to(weight.device, weight.dtype)


def _input_shape(model: nn.Module) -> tuple[int, int, int] | None:
    preprocessing = getattr(model, "preprocessing", None)
    if preprocessing is not None:
        return preprocessing.channels, preprocessing.image_size, preprocessing.image_size
    if isinstance(patch_embed := getattr(model, "patch_embed", None), nn.Module):  # timm's own word on the size it was built for
        size, proj = getattr(patch_embed, "img_size", None), getattr(patch_embed, "proj", None)
        if size is not None and hasattr(proj, "in_channels"):  # a convolution, or what a quantizer put in its place
            return proj.in_channels, *size
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(cfg, dict) and cfg.get("input_size"):
        return tuple(cfg["input_size"])
    tower = getattr(model, "visual", model)  # open_clip's
    if isinstance(size := getattr(tower, "image_size", None), tuple) and isinstance(conv := getattr(tower, "conv1", None), nn.Conv2d):
        return conv.in_channels, *size
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    if isinstance(size := getattr(config, "image_size", None), int):
        return getattr(config, "num_channels", 3), size, size
    return None


def macs_of(model: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of one pass in eval mode, as torch counts what really runs. Works on the meta device."""
    # torch's counter hooks a gradient to a parameter that is handed to a module, and fails where none flows
    with frozen_parameters(model), evaluating(model), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def bytes_of(model: nn.Module) -> int:
    """Bytes that the model's parameters and buffers take in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
