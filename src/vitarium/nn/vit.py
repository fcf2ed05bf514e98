"""Plain vision transformer: patches, a class token, positions, pre-norm blocks (Dosovitskiy et al. 2021).

Parameter names and arithmetic are those of MAE and timm, whose checkpoints load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.nn.attention import Attention
from vitarium.nn.layers import DropPath, Mlp, drop_path_rates
from vitarium.nn.patch_embed import PatchEmbed
from vitarium.nn.positions import EvalCache, fit_position_table, sincos_2d
from vitarium.nn.tokens import TokenBackbone
from vitarium.ops.maps import as_tokens

EPS = 1e-6
"""Epsilon of every norm."""


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, x + Attention(LN(x)), then x + MLP(LN(x)): (B, N, dim) -> the same shape.

    Args:
        dim, num_heads: channels and heads.
        mlp_ratio: ratio of the MLP's hidden channels to dim.
        drop_path: stochastic depth rate of both branches.
        attn: token mixer in place of the attention; additional arguments of `forward` are passed to it.
        eps: epsilon of both norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attn: nn.Module | None = None,
        eps: float = EPS,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads) if attn is None else attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *context))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sincos_table(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed sine-cosine positions of a class token (zeros) and the patches of a grid, (1, 1 + h w, dim)."""
    return torch.cat([torch.zeros(1, dim), sincos_2d(dim, *grid)])[None]


class VisionTransformer(TokenBackbone):
    """Plain vision transformer: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    With the class token as output the final norm is applied to the tokens (`norm`); with averaged patches, to the pooled features
    (`head_norm`, the fc_norm of timm and MAE).

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        patch_size: side of a patch, pixels.
        image_size: side, in pixels, of the square image that the position table is made for.
        mlp_ratio: ratio of the MLP's hidden channels to embed_dim.
        global_pool: "token" for the class token, "avg" for the mean of the patches.
        probe_norm: add a batch norm without weights between the pooled features and the head, as in linear probing; the tokens are then
            normed as well, whatever the pooling.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: embed_dim is not divisible by num_heads or by 4, or another global_pool.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        global_pool: str = "avg",
        probe_norm: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg', got {global_pool!r}")
        super().__init__(dim=embed_dim, depth=depth, stride=patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.table_grid = self.patch_embed.grid(image_size, image_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, self.table_grid))
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates)
        self.global_pool = global_pool
        norm = nn.LayerNorm(embed_dim, eps=EPS)
        if probe_norm:
            self.norm, self.head_norm = norm, nn.BatchNorm1d(embed_dim, eps=EPS, affine=False)
        elif global_pool == "token":
            self.norm = norm
        else:
            self.head_norm = norm
        nn.init.normal_(self.cls_token, std=0.02)
        init_as_mae(self)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.01 if probe_norm else 2e-5)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block, (B, 1 + h w, C), the class token first."""
        x = as_tokens(self.patch_embed(image))
        positions = self.positions(self.patch_embed.grid(*image.shape[-2:]))
        x = self.with_class_token(x + positions[:, 1:], positions)
        for block in self.blocks:
            x = self.run_blocks([block], x)
            yield x

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table of a grid, (1, 1 + h w, C), resampled unless the model was made for this grid."""
        return self.cache.for_grid(self, self.pos_embed, self.table_grid, grid, prefix=1)

    def with_class_token(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Prepend the class token with its position to patch tokens, all or some of them: (B, K, C) -> (B, 1 + K, C)."""
        first = (self.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        return torch.cat([first.to(patches.dtype), patches], 1)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return MAE's layer index for layer-wise decay as a function of a parameter's name: embeddings, blocks, and the rest."""
        last = len(self.blocks) + 1

        def layer(name: str) -> int:
            if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
                return 0
            return 1 + int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", name)) else last

        return layer

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        return fit_position_table(tensor, shape, self.table_grid, prefix=1) if name == "pos_embed" else None


def init_as_mae(module: nn.Module) -> None:
    """Apply MAE's initialisation in place: Xavier-uniform linear layers and patch embedding (as a matrix), zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))
