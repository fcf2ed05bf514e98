"""ConViT: gated positional self-attention, initialised as a convolution (d'Ascoli et al., "ConViT", 2021).

The idea: in the first layers of a ViT, each head mixes attention by content and attention by position under a learned gate. At
initialisation the positional attention of each head is centred on one neighbour, so that the layer is a convolution with a soft K x K
kernel; training decides through the gate how much of it remains. The class token, which has no position, is added before the last two
blocks, which use ordinary attention.

    A = (1 - s(g)) softmax(q k^T / sqrt(d)) + s(g) softmax_j(w . (dx, dy, dx^2 + dy^2)),  (dx, dy) from query to key, s the sigmoid
    initialisation of head (a, b) of K x K: w = (2 (b - c), 2 (a - c), -1) * locality, hence exp(-locality |r - r_ab|^2);  g = 1;  W_v = 1

Follows the authors' code (github facebookresearch/convit); its checkpoints and timm's load by name. Any image size: the positional
attention is computed from the grid and the position table is resampled (the authors' code needs square images).
Left out: a convolutional network in place of the patch embedding, which no config or released model of the authors has; dropout of the
attention weights, which none uses.
Cost: quadratic in tokens.

Speed: A v = (1 - s) S v + s P v is linear in the attentions, so S v runs in the fused kernel, and P, which is independent of the image, is
computed once per grid in evaluation mode; the original code builds both for each image of the batch and normalises the sum again.

Legend: B batch, N patches, C channels, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import Attention, EvalCache, Linear, PatchEmbed, TokenBackbone, TransformerBlock, drop_path_rates, init_weights
from vitarium.nn.positions import fit_position_table
from vitarium.ops.attention import merge_heads, split_heads, split_packed_heads
from vitarium.ops.maps import as_map, as_tokens

Grid = tuple[int, int]


def relative_positions(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return the offsets (dx, dy, dx^2 + dy^2) between all tokens, (N, N, 3) float64; dx counts columns, key minus query."""
    y, x = (torch.arange(n, device=device, dtype=torch.float64) for n in (rows, columns))
    dy, dx = ((of[None] - of[:, None]) for of in (y.repeat_interleave(columns), x.repeat(rows)))
    return torch.stack([dx, dy, dx**2 + dy**2], -1)


class GPSA(nn.Module):
    """Gated positional self-attention: tokens (B, N, dim) of a grid, without class token, -> the same shape.

    Args:
        dim: channels.
        num_heads: heads; the first K^2 are initialised at the offsets of a K x K kernel, K = floor(sqrt(heads)).
        locality: inverse width of the initial positional attention.
        local_init: use this initialisation; otherwise a random one.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the logits of the content; None: (dim / num_heads) ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        locality: float = 1.0,
        local_init: bool = True,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qk = Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.cache = EvalCache()
        init_weights(self)
        if local_init:
            self.init_as_convolution(locality)

    @torch.no_grad()
    def init_as_convolution(self, locality: float) -> None:
        """Initialise the values as the identity and the heads at the offsets of a kernel, in place."""
        nn.init.eye_(self.v.weight)
        side = math.isqrt(self.num_heads)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        for a in range(side):
            for b in range(side):
                self.pos_proj.weight[a + side * b] = locality * torch.tensor([2 * (b - centre), 2 * (a - centre), -1.0])

    def position_attention(self, grid: Grid) -> Tensor:
        """Return the positional attention P, (heads, N, N), whose rows sum to 1."""

        def build() -> Tensor:
            table = relative_positions(*grid, device=self.pos_proj.weight.device).to(self.pos_proj.weight.dtype)
            return self.pos_proj(table).permute(2, 0, 1).softmax(-1)

        return self.cache.get(self, grid, self.pos_proj.weight, build)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self._parts(x)
        by_content = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        by_place = self.position_attention(grid).to(v.dtype) @ v
        gate = self.gating_param.sigmoid().to(v.dtype)[:, None, None]
        return self.proj(merge_heads(by_content + gate * (by_place - by_content)))

    def attention(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the full attention A, (B, heads, N, N), for visualisation and measurements."""
        q, k, _ = self._parts(x)
        content = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        gate = self.gating_param.sigmoid()[:, None, None]
        return (1 - gate) * content + gate * self.position_attention(grid)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = split_packed_heads(self.qk(x), 2, self.num_heads)
        return q, k, split_heads(self.v(x), self.num_heads)


def non_locality(attention: Tensor, grid: Grid) -> Tensor:
    """Return the mean distance between query and key under an attention (B, heads, N, N), in patches, per head: (heads,)."""
    distance = relative_positions(*grid, device=attention.device)[..., 2].sqrt().to(attention.dtype)
    return (attention * distance).sum(-1).mean((0, 2))


@family(
    "convit",
    variants={
        "pico": dict(embed_dim=64, depth=4, num_heads=4, local_up_to_layer=3, patch_size=4, image_size=16),
        "tiny": dict(embed_dim=192, num_heads=4),  # 5.7 M, 73.1 % top-1
        "small": dict(embed_dim=432, num_heads=9),  # 27.8 M
        "base": dict(embed_dim=768, num_heads=16),  # 86.5 M
    },
    official=rename(),  # same names
    weights={size: {"in1k": (f"timm:convit_{size}.fb_in1k",)} for size in ("tiny", "small", "base")},
)
class ConViT(TokenBackbone):
    """ConViT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    The arguments are over 15 so that the authors' configs can be expressed.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        local_up_to_layer: number of initial blocks with `GPSA`; the class token is added after them, so at least one block must follow.
        locality_strength, use_local_init, qkv_bias, qk_scale: see `GPSA`; the last two concern all blocks.
        pos_embed: whether a learned absolute position is added to each patch (`use_pos_embed` of the authors).
        patch_size: side of a patch, pixels.
        image_size: side, in pixels, of the square image that the position table is made for.
        mlp_ratio: ratio of the MLP's hidden channels to embed_dim.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: no block is left after the class token is added.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        depth: int = 12,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        pos_embed: bool = True,
        patch_size: int = 16,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not 0 <= local_up_to_layer < depth:
            raise ValueError(
                f"local_up_to_layer must lie in 0..{depth - 1}, since the class token needs a block after it; got {local_up_to_layer}"
            )
        super().__init__(dim=embed_dim, depth=depth, stride=patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.local_up_to_layer = local_up_to_layer
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.table_grid = self.patch_embed.grid(image_size, image_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.table_grid), embed_dim)) if pos_embed else None
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                attn=Attention(embed_dim, num_heads, qkv_bias=qkv_bias, scale=qk_scale),
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self, conv=False)
        for block in self.blocks[:local_up_to_layer]:
            block.attn = GPSA(
                embed_dim,
                num_heads,
                locality=locality_strength,
                local_init=use_local_init,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
            )
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, grid: Grid) -> Tensor | float:
        """Return the position table of a grid, (1, N, C), resampled unless the model was made for this grid; 0 if it has no positions."""
        if self.pos_embed is None:
            return 0.0
        return self.cache.for_grid(self, self.pos_embed, self.table_grid, grid)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block: (B, N, C), and from the class token's first block on (B, 1 + N, C)."""
        grid = self.patch_embed.grid(*image.shape[-2:])
        x = as_tokens(self.patch_embed(image)) + self.positions(grid)
        for i, block in enumerate(self.blocks):
            if i == self.local_up_to_layer:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
            x = self.run_blocks([block], x, grid) if i < self.local_up_to_layer else self.run_blocks([block], x)
            yield x

    def as_map(self, features: Tensor, image_size: torch.Size) -> Tensor:  # type: ignore[override]
        rows, columns = self.patch_embed.grid(*image_size)
        return as_map(features[:, -rows * columns :], (rows, columns))

    @torch.no_grad()
    def gates(self) -> Tensor:
        """Return the weight of the positional attention of each head, s(g) in [0, 1]: (local_up_to_layer, heads)."""
        return torch.stack([gate.sigmoid() for name, gate in self.named_parameters() if name.endswith("gating_param")])

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"} if self.pos_embed is None else {"pos_embed", "cls_token"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        return fit_position_table(tensor, shape, self.table_grid) if name == "pos_embed" else None
