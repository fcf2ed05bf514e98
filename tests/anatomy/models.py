"""Small plain vision transformers of other libraries, with every part switched on, filled so that no part is neutral."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.transformers_models import VisionTower, wrap

TIMM = dict(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=5)
TRANSFORMERS = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4)

# name -> (timm's architecture, arguments, prefix tokens)
TIMM_MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {}, 1),
    "layer_scale": ("vit_tiny_patch16_224", dict(init_values=0.1), 1),
    "qk_norm": ("vit_tiny_patch16_224", dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True), 1),
    "registers": ("vit_tiny_patch16_224", dict(reg_tokens=3, no_embed_class=True), 4),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "average": ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg"), 0),
    "attention_pool": ("vit_tiny_patch16_224", dict(class_token=False, global_pool="map"), 0),
    "clip": ("vit_base_patch16_clip_224", {}, 1),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}, 5),
    "eva": ("eva_giant_patch14_224", {}, 1),
    "eva02": ("eva02_tiny_patch14_224", dict(global_pool="token"), 1),
    "dinov3": ("vit_small_patch16_dinov3", {}, 5),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}, 1),
}
ROTARY = ("eva02", "dinov3", "rope_mixed")

# name -> (class, configuration, arguments, prefix tokens)
TRANSFORMERS_MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {}, 1),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {}, 2),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", dict(use_swiglu_ffn=True), 1),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {}, 5),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {}, 1),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {}, 0),
    "beit": ("BeitForImageClassification", "BeitConfig", {}, 1),
    "beit_positions": ("BeitForImageClassification", "BeitConfig", dict(use_absolute_position_embeddings=True, use_mean_pooling=False), 1),
    "clip_tower": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1),
    "siglip_tower": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0),
}


def fill(model: nn.Module) -> nn.Module:
    """Weights that hide nothing: no gain is one, no scale is small, no bias is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (0.5 if p.ndim < 2 else 0.0))
    return model.eval()


def timm_model(name: str, **arguments: Any) -> nn.Module:
    import timm

    architecture, own, _ = TIMM_MODELS[name]
    return fill(timm.create_model(architecture, **{**TIMM, **own, **arguments}))


def transformers_model(name: str) -> nn.Module:
    import transformers

    cls, config, own, _ = TRANSFORMERS_MODELS[name]
    values = {**TRANSFORMERS, **own}
    made = getattr(transformers, config)(**({"vision_config": values} if name in ("clip", "siglip") else values))
    theirs = getattr(transformers, cls)(made)
    return fill(wrap(VisionTower(theirs, 5) if name.endswith("tower") else theirs, Preprocessing(16)))


NAMES = [f"timm-{name}" for name in TIMM_MODELS] + [f"transformers-{name}" for name in TRANSFORMERS_MODELS]


def make(name: str) -> nn.Module:
    library, _, kind = name.partition("-")
    return timm_model(kind) if library == "timm" else transformers_model(kind)


def prefix_of(name: str) -> int:
    library, _, kind = name.partition("-")
    return (TIMM_MODELS if library == "timm" else TRANSFORMERS_MODELS)[kind][-1]
