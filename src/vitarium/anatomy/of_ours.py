"""Anatomy of the plain vision transformer of nn/vit.py, which several systems use."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitarium.anatomy.parts import Anatomy, AttentionLayout, BlockLayout, read_block
from vitarium.nn.vit import VisionTransformer

ATTENTION = AttentionLayout(
    qkv=("qkv",),
    q_norm="q_norm",
    k_norm="k_norm",
    proj="proj",
    proj_drop="proj_drop",
    heads="num_heads",
    scale="scale",
    dropout="attn_drop",
)
BLOCKS = {
    "TransformerBlock": BlockLayout(
        norm1="norm1",
        attention="attn",
        branch1=("drop_path",),
        norm2="norm2",
        mlp="mlp",
        branch2=("drop_path",),
        attention_layouts={"Attention": ATTENTION},
    )
}


def is_tower(module: nn.Module) -> bool:
    """Return whether a module is such a model."""
    return isinstance(module, VisionTransformer)


def read(model: nn.Module, path: str, tower: Any) -> Anatomy:
    """Return the anatomy of a tower at `path` in the model.

    Raises:
        UnsupportedModel: a block of another kind.
    """
    start = f"{path}." if path else ""
    size = tower.patch_embed.patch_size
    return Anatomy(
        family="vitarium ViT",
        tower=tower,
        embedding=tower.patch_embed,
        blocks=tuple(read_block(f"{start}blocks.{i}", block, BLOCKS) for i, block in enumerate(tower.blocks)),
        prefix=1,
        class_token=True,
        patch_size=(size, size),
        norm=tower.norm,
        head=tower.head,
        reads_patches=path != "" or tower.global_pool != "token",
    )
