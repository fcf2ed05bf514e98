"""timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP towers and their like) and Eva (EVA-02, DINOv3, PE, rotary ViTs)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitarium.anatomy.parts import Anatomy, AttentionLayout, BlockLayout, read_block
from vitarium.errors import UnsupportedModel

ATTENTION = AttentionLayout(
    qkv=("qkv",),
    q_norm="q_norm",
    k_norm="k_norm",
    norm="norm",
    gate="gate",
    proj="proj",
    proj_drop="proj_drop",
    heads="num_heads",
    scale="scale",
    dropout="attn_drop",
)
ROTARY_ATTENTION = AttentionLayout(
    qkv=("qkv", "q_proj", "k_proj", "v_proj"),
    biases=("q_bias", "k_bias", "v_bias"),
    q_norm="q_norm",
    k_norm="k_norm",
    norm="norm",
    gate="gate",
    proj="proj",
    proj_drop="proj_drop",
    heads="num_heads",
    scale="scale",
    dropout="attn_drop",
    kv_groups="num_kv_groups",
    rotate_half="rotate_half",
)
BLOCKS = {
    "Block": BlockLayout(
        norm1="norm1",
        attention="attn",
        branch1=("ls1", "drop_path1"),
        norm2="norm2",
        mlp="mlp",
        branch2=("ls2", "drop_path2"),
        arguments=("attn_mask", "is_causal"),
        attention_layouts={"Attention": ATTENTION},
    ),
    "EvaBlock": BlockLayout(
        norm1="norm1",
        attention="attn",
        branch1=("gamma_1", "drop_path1"),
        norm2="norm2",
        mlp="mlp",
        branch2=("gamma_2", "drop_path2"),
        arguments=("rope", "attn_mask", "is_causal"),
        attention_layouts={"EvaAttention": ROTARY_ATTENTION, "AttentionRope": ROTARY_ATTENTION},
    ),
}
TOWERS = ("VisionTransformer", "Eva")


def is_tower(module: nn.Module) -> bool:
    """Return whether a module is one of timm's plain vision transformers, or of a class derived from one."""
    return any(cls.__name__ in TOWERS and cls.__module__.startswith("timm.models.") for cls in type(module).__mro__)


def read(model: nn.Module, path: str, tower: Any) -> Anatomy:
    """Return the anatomy of a tower at `path` in the model.

    Raises:
        UnsupportedModel: a block of another kind, or without what the methods need.
    """
    start = f"{path}." if path else ""
    blocks = tuple(read_block(f"{start}blocks.{i}", block, BLOCKS) for i, block in enumerate(tower.blocks))
    if not blocks:
        raise UnsupportedModel(f"{type(tower).__name__} has no blocks")
    dropped = getattr(tower, "patch_drop", None)
    if getattr(dropped, "prob", 0):
        raise UnsupportedModel(f"{type(tower).__name__} drops patches at random in training (patch_drop_rate > 0); create it without")
    distilled = getattr(tower, "dist_token", None) is not None
    pooled = getattr(tower, "attn_pool", None) is not None or (getattr(tower, "global_pool", "") != "token" and not distilled)
    size = tower.patch_embed.patch_size
    return Anatomy(
        family="timm Eva" if blocks[0].layout is BLOCKS["EvaBlock"] else "timm ViT",
        tower=tower,
        embedding=tower.patch_embed,
        blocks=blocks,
        prefix=tower.num_prefix_tokens,
        class_token=tower.cls_token is not None,
        patch_size=(size, size) if isinstance(size, int) else tuple(size),
        norm=tower.norm,
        head=tower.head if isinstance(getattr(tower, "head", None), nn.Module) else None,
        reads_patches=pooled or path != "",
        rotary=getattr(tower, "rope", None) is not None,
    )
