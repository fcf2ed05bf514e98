"""transformers' vision towers: ViT, DeiT, BEiT, DINOv2 (with registers), CLIP, SigLIP; alone, in a classifier, or with a text tower."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitarium.anatomy.parts import Anatomy, AttentionLayout, BlockLayout, read_block
from vitarium.catalog.transformers_models import VisionTower
from vitarium.errors import UnsupportedModel


def _attention(kind: str, heads: str, scale: str, dropout: str, proj: str) -> dict[str, AttentionLayout]:
    return {kind: AttentionLayout(qkv=("", "q_proj", "k_proj", "v_proj"), proj=proj, heads=heads, scale=scale, dropout=dropout)}


def _vit(kind: str) -> BlockLayout:
    return BlockLayout(
        norm1="layernorm_before",
        attention="attention",
        branch1=("dropout",),
        norm2="layernorm_after",
        mlp="mlp",
        branch2=("dropout",),
        arguments=("attention_mask",),
        attention_layouts=_attention(kind, "num_attention_heads", "scaling", "attention_dropout", "o_proj"),
    )


def _dinov2(kind: str) -> BlockLayout:
    return BlockLayout(
        norm1="norm1",
        attention="attention",
        branch1=("layer_scale1", "drop_path"),
        norm2="norm2",
        mlp="mlp",
        branch2=("layer_scale2", "drop_path"),
        arguments=("attention_mask",),
        attention_layouts=_attention(kind, "num_attention_heads", "scaling", "attention_dropout", "o_proj"),
    )


def _clip(kind: str) -> BlockLayout:
    return BlockLayout(
        norm1="layer_norm1",
        attention="self_attn",
        norm2="layer_norm2",
        mlp="mlp",
        arguments=("attention_mask",),
        attention_layouts=_attention(kind, "num_heads", "scale", "dropout", "out_proj"),
    )


def _beit(kind: str) -> BlockLayout:
    return BlockLayout(
        norm1="layernorm_before",
        attention="attention",
        branch1=("dropout", "lambda_1", "drop_path"),
        norm2="layernorm_after",
        mlp="mlp",
        branch2=("dropout", "lambda_2", "drop_path"),
        arguments=("attention_mask", "interpolate_pos_encoding", "resolution"),
        attention_layouts=_attention(kind, "num_attention_heads", "scaling", "attention_dropout", "o_proj"),
    )


BLOCKS = {
    "BeitLayer": _beit("BeitAttention"),
    "ViTLayer": _vit("ViTAttention"),
    "DeiTLayer": _vit("DeiTAttention"),
    "Dinov2Layer": _dinov2("Dinov2Attention"),
    "Dinov2WithRegistersLayer": _dinov2("Dinov2WithRegistersAttention"),
    "CLIPEncoderLayer": _clip("CLIPAttention"),
    "SiglipEncoderLayer": _clip("SiglipAttention"),
}

# class of the tower -> (path of its blocks, its final norm, number of class and distillation tokens)
TOWERS: dict[str, tuple[str, str, int]] = {
    "BeitModel": ("layers", "layernorm", 1),
    "ViTModel": ("layers", "layernorm", 1),
    "DeiTModel": ("layers", "layernorm", 2),
    "Dinov2Model": ("encoder.layer", "layernorm", 1),
    "Dinov2WithRegistersModel": ("encoder.layer", "layernorm", 1),
    "CLIPVisionModel": ("encoder.layers", "post_layernorm", 1),
    "SiglipVisionModel": ("encoder.layers", "post_layernorm", 0),
}
CLASS_HEADS = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
"""Heads that read the class token (and the distillation token) alone; the others pool patches, and a bare tower returns all tokens."""


def is_tower(module: nn.Module) -> bool:
    """Return whether a module is one of these towers."""
    return type(module).__name__ in TOWERS and type(module).__module__.startswith("transformers.")


def read(model: nn.Module, path: str, tower: Any) -> Anatomy:
    """Return the anatomy of a tower at `path` in the model.

    Raises:
        UnsupportedModel: a block of another kind, as in releases of transformers before 5.
    """
    place, norm, prefix = TOWERS[type(tower).__name__]
    start = f"{path}." if path else ""
    if any(getattr(part, "relative_position_bias_table", None) is not None for part in tower.modules()):
        raise UnsupportedModel(
            f"{type(tower).__name__} adds a relative position bias to its attention, which methods on blocks cannot carry when tokens move"
        )
    try:
        layers = tower.get_submodule(place)
    except AttributeError as error:
        import transformers

        message = (
            f"{type(tower).__name__} of transformers {transformers.__version__} has no {place!r}; anatomy reads transformers 5 or later"
        )
        raise UnsupportedModel(message) from error
    blocks = tuple(read_block(f"{start}{place}.{i}", layer, BLOCKS) for i, layer in enumerate(layers))
    size = tower.config.patch_size
    owner = model.get_submodule(path.rpartition(".")[0]) if path else None
    class_alone = type(owner).__name__ in CLASS_HEADS or (isinstance(owner, VisionTower) and type(tower).__name__ == "CLIPVisionModel")
    return Anatomy(
        family=f"transformers {type(tower).__name__.removesuffix('Model').removesuffix('Vision')}",
        tower=tower,
        embedding=tower.embeddings,
        blocks=blocks,
        prefix=prefix + getattr(tower.config, "num_register_tokens", 0),
        class_token=prefix > 0,
        patch_size=(size, size) if isinstance(size, int) else tuple(size),
        norm=getattr(tower, norm),
        head=getattr(owner, "classifier", None),
        reads_patches=not class_alone,
    )
