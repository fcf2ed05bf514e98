"""Vision transformer that "Sparse then Prune" fine-tunes: ViT-B/16 at 384 pixels, with the authors' names and dropout.

The weights from which the authors start load too: Google's `ViT-B_16.npz` of ImageNet-21k, timm's and transformers' files.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.catalog.dialects import VIT_DIALECTS
from vitarium.catalog.registry import State, chain, join
from vitarium.nn import VisionTransformer


def _matrices(state: State) -> State:
    """Convert the authors' tensors with an axis for the heads, (in, heads, d) and (heads, d, out), to linear weights (out, in)."""
    flat = dict(state)
    for name, tensor in state.items():
        if ".attn." in name and tensor.ndim == 3:
            flat[name] = (tensor.flatten(0, 1) if ".out." in name else tensor.flatten(1)).T.contiguous()
        elif ".attn." in name and tensor.ndim == 2 and name.endswith("bias"):
            flat[name] = tensor.flatten()
    return flat


OFFICIAL = chain(
    _matrices,
    join("qkv", "query", "key", "value"),
    rename(
        (r"^embedding\.", "patch_embed.proj."),
        (r"^transformer\.pos_embedding\.pos_embedding$", "pos_embed"),
        (r"^transformer\.encoder_layers\.(\d+)\.attn\.out\.", r"blocks.\1.attn.proj."),
        (r"^transformer\.encoder_layers\.", "blocks."),
        (r"^transformer\.norm\.", "norm."),
        (r"^classifier\.", "head."),
    ),
)


@family(
    "sparse_prune",
    variants={
        "pico": dict(embed_dim=64, depth=4, num_heads=4, patch_size=4, image_size=16, mlp_ratio=2.0, dropout=0.0),
        "base": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16, image_size=384),  # 86 M
    },
    official=OFFICIAL,
    dialects=VIT_DIALECTS,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
)
class SparseViT(VisionTransformer):
    """Classify images (B, in_chans, H, W), any H and W, from the class token: logits (B, num_classes).

    Args:
        dropout: rate after the positions, the attention, and both layers of the MLPs; the authors' is 0.1.
        The others as for `vitarium.nn.VisionTransformer`.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        image_size: int = 384,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        shape: dict[str, Any] = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_size=patch_size, image_size=image_size)
        options: dict[str, Any] = dict(in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate)
        super().__init__(global_pool="token", mlp_ratio=mlp_ratio, **shape, **options)
        self.dropout = dropout
        for block in self.blocks:
            block.attn.proj_drop = block.mlp.drop_rate = float(dropout)  # type: ignore[union-attr, assignment]
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.eps = 1e-5

    def with_class_token(self, patches: Tensor, positions: Tensor) -> Tensor:
        return F.dropout(super().with_class_token(patches, positions), self.dropout, self.training)
