"""Shared parts of TNT and PyramidTNT: the projection of words to sentences, checkpoint names."""

from __future__ import annotations

from torch import Tensor, nn

from vitarium.catalog import rename
from vitarium.nn import Linear

Grid = tuple[int, int]
Pair = tuple[Tensor, Tensor]
EPS = 1e-5
"""Epsilon of every norm."""


class Gather(nn.Module):
    """Projection of the concatenated words of each sentence: (B, N, n c) -> (B, N, C)."""

    def __init__(self, joined_dim: int, dim: int, *, bias: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(joined_dim)
        self.proj = Linear(joined_dim, dim, bias=bias)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, joined: Tensor) -> Tensor:
        return self.norm2(self.proj(self.norm1(joined)))


PARTS = rename(
    (r"^(.*blocks\.\d+)\.(inner|outer)_(norm1|norm2|attn|mlp)\.", r"\1.\2.\3."),
    (r"^(.*blocks\.\d+)\.proj_norm([12])\.", r"\1.gather.norm\2."),
    (r"^(.*blocks\.\d+)\.proj\.", r"\1.gather.proj."),
    (r"^outer_tokens$", None),  # unused frozen zeros
    (r"^proj_norm([12])\.", r"patch_embed.gather.norm\1."),
    (r"^proj\.", "patch_embed.gather.proj."),
)
"""Renamer from the authors' names inside a block and in the first projection of words to sentences."""
