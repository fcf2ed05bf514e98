"""open_clip's vision towers (VisionTransformer with plain residual blocks), alone or in a model with a text tower."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitarium.anatomy.parts import Anatomy, AttentionLayout, BlockLayout, read_block
from vitarium.errors import UnsupportedModel

ATTENTION = AttentionLayout(
    qkv=("in_proj_weight",),
    biases=("in_proj_bias",),
    proj="out_proj",
    heads="num_heads",
    scale="",
    dropout="dropout",
)
BLOCKS = {
    "ResidualAttentionBlock": BlockLayout(
        norm1="ln_1",
        attention="attn",
        branch1=("ls_1",),
        norm2="ln_2",
        mlp="mlp",
        branch2=("ls_2",),
        arguments=("k_x", "v_x", "attn_mask"),
        attention_layouts={"MultiheadAttention": ATTENTION},
    )
}


def is_tower(module: nn.Module) -> bool:
    """Return whether a module is one of these towers."""
    return type(module).__name__ == "VisionTransformer" and type(module).__module__.startswith("open_clip.")


def read(model: nn.Module, path: str, tower: Any) -> Anatomy:
    """Return the anatomy of a tower at `path` in the model.

    Raises:
        UnsupportedModel: the blocks are of another kind, or take sequences of the layout (N, B, C).
    """
    start = f"{path}." if path else ""
    blocks = tuple(read_block(f"{start}transformer.resblocks.{i}", b, BLOCKS) for i, b in enumerate(tower.transformer.resblocks))
    if not getattr(blocks[0].attention.module, "batch_first", False):
        raise UnsupportedModel("this open_clip tower runs its blocks on (N, B, C); create it with batch_first=True")
    if getattr(tower.patch_dropout, "prob", 0):
        raise UnsupportedModel("this open_clip tower drops patches at random in training (patch_dropout > 0); create it without")
    return Anatomy(
        family="open_clip ViT",
        tower=tower,
        embedding=tower.conv1,
        blocks=blocks,
        prefix=1,
        class_token=True,
        patch_size=tuple(tower.patch_size),
        norm=tower.ln_post,
        head=None,
        reads_patches=tower.attn_pool is not None or tower.pool_type != "tok" or tower.output_tokens,
    )
