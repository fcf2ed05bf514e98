"""Shared parts of TNT and PyramidTNT: the projection of words to sentences, the gated MLP, checkpoint names."""

from __future__ import annotations

from torch import Tensor, nn

from vitarium.catalog import rename
from vitarium.nn import Linear, Mlp

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


class Excitation(nn.Module):
    """Gate of each channel in (-1, 1), computed from the mean of all tokens: (B, N, dim) -> (B, 1, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = Linear(dim, dim // 4), Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.norm(x.mean(1, keepdim=True))).relu()).tanh()


class GatedMlp(Mlp):
    """MLP whose output t is multiplied by 1 + `Excitation`(t): (B, N, dim) -> the same shape."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(dim, hidden_dim)
        self.se = Excitation(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x * self.se(x)


PARTS = rename(
    (r"^(.*blocks\.\d+)\.(inner|outer)_(norm1|norm2|attn|mlp)\.", r"\1.\2.\3."),
    (r"^(.*blocks\.\d+)\.proj_norm([12])\.", r"\1.gather.norm\2."),
    (r"^(.*blocks\.\d+)\.proj\.", r"\1.gather.proj."),
    (r"^(.*blocks\.\d+)\.se_layer\.fc\.0\.", r"\1.outer.mlp.se.norm."),
    (r"^(.*blocks\.\d+)\.se_layer\.fc\.1\.", r"\1.outer.mlp.se.fc1."),
    (r"^(.*blocks\.\d+)\.se_layer\.fc\.3\.", r"\1.outer.mlp.se.fc2."),
    (r"^outer_tokens$", None),  # unused frozen zeros
    (r"^proj_norm([12])\.", r"patch_embed.gather.norm\1."),
    (r"^proj\.", "patch_embed.gather.proj."),
)
"""Renamer from the authors' names inside a block and in the first projection of words to sentences."""
