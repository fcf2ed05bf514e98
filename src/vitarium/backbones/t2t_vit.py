"""T2T-ViT: progressive tokenisation before a deep and narrow transformer (Yuan et al., "Tokens-to-Token ViT", 2021).

The idea: splitting an image into 16 x 16 patches in one step loses the edges and lines that cross them. Here patches overlap (soft split)
and pass a small attention layer, are reshaped to a map and split again, so that each token aggregates its neighbours twice.

    tokens = unfold 7 x 7, stride 4; layer 147 -> t; unfold 3 x 3, stride 2; layer 9t -> t; unfold 3 x 3, stride 2; linear 9t -> C
    a layer: y = LN(x);  z = v + W_o A(q, k) v;  z <- z + MLP(LN(z)), one head of width t; the skip starts at v, because widths differ
    A "transformer": softmax(q k^T / sqrt(width of x))
    A "performer":   phi(q) phi(k)^T, rows normalised, phi(u) = exp(w u - |u|^2 / 2) / sqrt(m), the m rows of w fixed and orthogonal

Follows the authors' code (github yitu-opensource/T2T-ViT); its checkpoints load by name. The released models scale the logits of the blocks
by the full width, C^-1/2, instead of the width of a head; so do the variants here (`qk_scale="width"`). Any image size: the fixed sine
table is resampled to other grids. There is no automatic download: pass a downloaded file as `checkpoint`.
Left out: convolutions in place of the soft splits, whose forward pass is not in the authors' code; their SE, dense and Ghost models, which
are comparisons with other wiring in files of their own, without released weights.
Cost: quadratic in the tokens of each layer, linear for the performer.

Speed: patches are copied once, directly into token order; the softmax over early tokens is never materialised; the last split and its
linear layer are one convolution.

Legend: B batch, N tokens, C channels, t token_dim, m random features (t / 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import Attention, EvalCache, Linear, Mlp, TokenBackbone, TransformerBlock, drop_path_rates, init_weights
from vitarium.nn.positions import fit_position_table
from vitarium.ops.maps import as_map, as_tokens
from vitarium.ops.precision import without_autocast

Grid = tuple[int, int]
EPS = 1e-5
"""Epsilon of every norm."""
DROP = 0.1
"""Dropout rate inside the performer layer in training, fixed as in the authors' code."""


class SoftSplit(nn.Unfold):
    """Soft split of a map into overlapping patches: (B, c, H, W) -> tokens (B, h w, c K K), each ordered by channel, then row.

    Args:
        in_channels: c.
        kernel_size, stride: K and s; the map is padded with zeros so that h = H / s if s divides H.
    """

    def __init__(self, in_channels: int, kernel_size: int, stride: int):
        super().__init__(kernel_size, padding=soft_padding(kernel_size, stride), stride=stride)
        self.in_channels = in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0) + 2 * (self.padding, self.padding))  # type: ignore[arg-type]
        patches = x.unfold(1, self.kernel_size, self.stride).unfold(2, self.kernel_size, self.stride)  # type: ignore[arg-type]
        return patches.flatten(3).flatten(1, 2)


def soft_padding(kernel_size: int, stride: int) -> int:
    """Return the zero padding on each side of a soft split."""
    return (kernel_size - stride + 1) // 2


class TransformerLayer(nn.Module):
    """Tokens-to-token layer (see the module's docstring) with softmax attention: (B, N, in_dim) -> (B, N, dim)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.scale = in_dim**-0.5
        self.norm1 = nn.LayerNorm(in_dim)
        self.qkv = Linear(in_dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x))[:, None].chunk(3, -1)
        z = (v + self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))[:, 0]
        return z + self.mlp(self.norm2(z))


class PerformerLayer(nn.Module):
    """Tokens-to-token layer with attention by positive random features, in at least float32: (B, N, in_dim) -> (B, N, dim).

    Args:
        in_dim, dim: input and output channels.
        features: number m of random features, dim / 2 by default.
    """

    w: Tensor

    def __init__(self, in_dim: int, dim: int, features: int | None = None):
        super().__init__()
        features = features or dim // 2
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = Linear(in_dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim, drop=DROP)
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        kqv = self.kqv(self.norm1(x))
        k, q, v = kqv.chunk(3, -1)
        z = v + F.dropout(self.proj(self.attend(q, k, v).to(v.dtype)), DROP, self.training)
        return z + self.mlp(self.norm2(z))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute performer attention of q, k, v (B, N, dim): (B, N, dim), float32 or wider; `eps` is added to the row sums."""
        wide = torch.promote_types(v.dtype, torch.float32)
        with without_autocast(v):
            phi_q, phi_k = self.features(q.to(wide)), self.features(k.to(wide))
            total = (phi_q @ phi_k.sum(1, keepdim=True).mT) + eps
            return phi_q @ (phi_k.mT @ v.to(wide)) / total

    def features(self, u: Tensor) -> Tensor:
        """Compute the random features phi(u), (..., dim) -> (..., m)."""
        w = self.w.to(u.dtype)
        return (u @ w.T - u.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(w.shape[0])


LAYERS = {"performer": PerformerLayer, "transformer": TransformerLayer}


class T2TTokenizer(nn.Module):
    """Tokens-to-token module, a stem for plain transformers: images (B, in_chans, H, W) -> map (B, embed_dim, h, w).

    Args:
        splits: (kernel, stride) of each soft split, pixels or tokens. Each is followed by an attention layer, the last by a linear layer. A
            single split is the patch embedding of a ViT.
        layer: "performer" or "transformer".
        token_dim: channels t of the intermediate tokens.
        in_chans, embed_dim: channels of the image and of the map.

    Raises:
        ValueError: another layer, no split, or a kernel smaller than its stride.
    """

    def __init__(self, splits: Sequence[Grid], layer: str, token_dim: int, in_chans: int, embed_dim: int):
        if layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
        if not splits or any(kernel < stride or stride < 1 for kernel, stride in splits):
            raise ValueError(f"splits must be (kernel, stride) pairs, one per soft split, with kernel >= stride >= 1; got {splits}")
        super().__init__()
        self.geometry = [tuple(split) for split in splits]
        channels = [in_chans] + [token_dim] * (len(splits) - 1)
        self.splits = nn.ModuleList(SoftSplit(c, *split) for c, split in zip(channels, splits[:-1], strict=False))
        self.layers = nn.ModuleList(LAYERS[layer](c * kernel**2, token_dim) for c, (kernel, _) in zip(channels, splits[:-1], strict=False))
        kernel, stride = splits[-1]
        self.project = nn.Conv2d(channels[-1], embed_dim, kernel, stride, padding=soft_padding(kernel, stride))

    def grid(self, height: int, width: int) -> Grid:
        """Return the rows and columns of the map of an image of height x width."""
        return self.grids(height, width)[-1]

    def grids(self, height: int, width: int) -> list[Grid]:
        """Return the rows and columns after each split."""
        found = [(height, width)]
        for kernel, stride in self.geometry:
            rows, columns = ((side + 2 * soft_padding(kernel, stride) - kernel) // stride + 1 for side in found[-1])
            found.append((rows, columns))
        return found[1:]

    def smallest(self) -> int:
        """Return the smallest side of an image that gives a token."""
        side = 1
        for kernel, stride in reversed(self.geometry):
            side = max(1, (side - 1) * stride + kernel - 2 * soft_padding(kernel, stride))
        return side

    def maps(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the map after each layer, (B, t, h_i, w_i), and the final map of embed_dim channels (strides 4, 8, 16 as released)."""
        x = image
        for split, layer, grid in zip(self.splits, self.layers, self.grids(*image.shape[-2:]), strict=False):
            x = as_map(layer(split(x)), grid)
            yield x
        yield self.project(x)

    def forward(self, image: Tensor) -> Tensor:
        return list(self.maps(image))[-1]


def sine_table(dim: int, count: int) -> Tensor:
    """Return a 1-D sine-cosine table (1, count, dim): the angles pos / 10000^(2 floor(j / 2) / dim), sine for even j, cosine for odd j."""
    pair = torch.arange(dim, dtype=torch.float64) // 2
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * pair / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()[None]


_NAMES = [
    (rf"^tokens_to_token\.attention{number + 1}\.{theirs}", f"patch_embed.layers.{number}.{ours}")
    for number in (0, 1)
    for theirs, ours in ((r"attn\.", ""), (r"mlp\.0\.", "mlp.fc1."), (r"mlp\.2\.", "mlp.fc2."), ("", ""))
]


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert an authors' checkpoint; the last linear layer on unfolded patches, (C, c K K), becomes a convolution."""
    state = rename((r"^module\.", ""))(state)
    state = rename(*_NAMES, (r"^tokens_to_token\.project\.", "patch_embed.project."))(state)
    name, layer = "patch_embed.project.weight", state.get("patch_embed.layers.0.proj.weight")
    if name in state and layer is not None and state[name].ndim == 2:
        side = math.isqrt(state[name].shape[1] // len(layer))
        state[name] = state[name].unflatten(1, (len(layer), side, side))
    return state


def _row(embed_dim: int, depth: int, mlp_ratio: float, layer: str = "performer", **options: object) -> dict[str, object]:
    return dict(embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 64, mlp_ratio=mlp_ratio, layer=layer, qk_scale="width", **options)


@family(
    "t2t_vit",
    variants={
        "pico": dict(embed_dim=64, depth=4, num_heads=4, mlp_ratio=2, splits=((3, 2), (3, 2)), token_dim=32, image_size=16),
        "7": _row(256, 7, 2),  # 4.3 M, 71.7 % top-1
        "10": _row(256, 10, 2),  # 5.9 M, 75.2 %
        "12": _row(256, 12, 2),  # 6.9 M, 76.5 %
        "14": _row(384, 14, 3, drop_path_rate=0.1),  # 21.5 M, 81.5 %
        "19": _row(448, 19, 3, drop_path_rate=0.1),  # 39.2 M, 81.9 %
        "24": _row(512, 24, 3, drop_path_rate=0.1),  # 64.1 M, 82.3 %
        "14_384": _row(384, 14, 3, drop_path_rate=0.1, image_size=384),  # 83.3 %
        "t_14": _row(384, 14, 3, "transformer", drop_path_rate=0.1),  # 21.5 M, 81.7 %
        "t_19": _row(448, 19, 3, "transformer", drop_path_rate=0.1),  # 39.2 M, 82.4 %
        "t_24": _row(512, 24, 3, "transformer", drop_path_rate=0.1),  # 64.1 M, 82.6 %
        "14_resnext": _row(384, 14, 3) | dict(num_heads=32),  # 21.5 M, a comparison with ResNeXt
        "14_wide": _row(768, 4, 3) | dict(qk_scale=512**-0.5),  # 25.0 M, a comparison of wide and deep
    },
    official=official,
    crop_pct=0.9,
)
class T2TViT(TokenBackbone):
    """T2T-ViT classifier: images (B, in_chans, H, W), H and W at least `min_size`, -> logits (B, num_classes).

    Args:
        embed_dim, depth, num_heads: channels, blocks and heads of the transformer.
        mlp_ratio: ratio of the MLPs' hidden channels to embed_dim.
        splits, layer, token_dim: see `T2TTokenizer`.
        qkv_bias: whether the blocks' projections to queries, keys and values have a bias.
        qk_scale: scale of the blocks' logits: "head" for the usual head_dim^-1/2, "width" for embed_dim^-1/2, as in the released models, or
            a number.
        image_size: side, in pixels, of the square image that the position table is made for.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: a qk_scale that is neither of these nor positive, another layer, invalid splits, or embed_dim is not divisible by
            num_heads.
    """

    pos_embed: Tensor
    patch_embed: T2TTokenizer  # type: ignore[assignment]

    first_conv = ()  # the image is unfolded and projected by linear layers

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        splits: Sequence[Grid] = ((7, 4), (3, 2), (3, 2)),
        layer: str = "performer",
        token_dim: int = 64,
        qkv_bias: bool = False,
        qk_scale: str | float = "head",
        image_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        scales = {"head": None, "width": embed_dim**-0.5}
        if not (qk_scale in scales if isinstance(qk_scale, str) else qk_scale > 0):
            raise ValueError(f"qk_scale must be 'head' or 'width', or a positive number, got {qk_scale!r}")
        scale = scales[qk_scale] if isinstance(qk_scale, str) else qk_scale
        tokenizer = T2TTokenizer(splits, layer, token_dim, in_chans, embed_dim)
        super().__init__(
            dim=embed_dim,
            depth=depth,
            stride=math.prod(stride for _, stride in splits),
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            min_size=tokenizer.smallest(),
        )
        self.patch_embed = tokenizer
        self.table_grid = tokenizer.grid(image_size, image_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("pos_embed", sine_table(embed_dim, 1 + math.prod(self.table_grid)))
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                attn=Attention(embed_dim, num_heads, qkv_bias=qkv_bias, scale=scale),
                eps=EPS,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_weights(self)

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table of a grid, (1, 1 + h w, C), resampled unless the model was made for this grid."""
        return self.cache.for_grid(self, self.pos_embed, self.table_grid, grid, prefix=1)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block, (B, 1 + h w, C), the class token first."""
        patches = as_tokens(self.patch_embed(image))
        first = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        x = torch.cat([first, patches], 1) + self.positions(self.patch_embed.grid(*image.shape[-2:]))
        for block in self.blocks:
            x = self.run_blocks([block], x)
            yield x

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        return fit_position_table(tensor, shape, self.table_grid, prefix=1) if name == "pos_embed" else None
