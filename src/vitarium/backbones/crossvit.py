"""CrossViT: two ViT branches with small and large patches, fused by cross-attention of class tokens (Chen et al., "CrossViT", 2021).

The idea: small and large patches give complementary features, but attention between all of their tokens would be costly. After some blocks,
the class token of each branch is projected to the width of the other branch, attends once to the patches there, at a cost linear in their
number, and is projected back. The logits of the two branches are averaged.

    c' = P(c);  c' <- c' + W_o softmax(W_q LN(c') (W_k LN(z))^T / sqrt(d)) W_v LN(z),  z = [c'; patches of the other branch];  c <- R(c')
    P and R: Linear(GELU(LN(.)))

Follows the authors' code (github IBM/CrossViT); its checkpoints and timm's load by name. The two heads are merged into one on the
concatenated class tokens, W = [W_0, W_1] / 2, which is the same function. Any image size: each branch resizes the image, bicubically as in
the authors' code, to the nearest whole number of its patches; position tables are resampled. With `fixed_sizes`, it resizes every image to
the size that its table is made for, as the authors' and timm's code.
Left out: more than two branches and a T2T stem, which no config has (the file of the stem is not in the authors' repository); an MLP after
the fusion, which the authors switched off (its ratio, the third of theirs, has no effect).
Cost: that of the two ViTs, quadratic in patches.

Speed: the fusion forms a single query per branch.

Legend: B batch, N patches, D channels; branch 0 has small patches, branch 1 large ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import Attention, Backbone, DropPath, EvalCache, Linear, Stage, TransformerBlock, init_weights
from vitarium.nn.backbone import POOLS
from vitarium.nn.positions import fit_position_table
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens

Grid = tuple[int, int]
Pair = tuple[Tensor, Tensor]
CONVOLUTIONS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}
"""(kernel, stride, padding) of the three convolutions of the "dagger" models, by patch size."""


class Branch(nn.Module):
    """Patch embedding of one branch, with class token and positions: images (B, in_chans, H, W) -> tokens (B, 1 + N, D).

    Args:
        patch_size: side of a patch, pixels.
        image_size: side, in pixels, of the square image that the position table is made for.
        dim: channels.
        multi_conv: three convolutions in place of one; only for patches of 12 or 16 pixels.
    """

    def __init__(self, patch_size: int, image_size: int, dim: int, in_chans: int, multi_conv: bool):
        super().__init__()
        self.patch_size, self.table_side = patch_size, image_size // patch_size
        if multi_conv:
            widths = (in_chans, dim // 4, dim // 2, dim)
            convs: list[nn.Module] = []
            for (kernel, stride, padding), a, b in zip(CONVOLUTIONS[patch_size], widths, widths[1:], strict=False):
                convs += [nn.Conv2d(a, b, kernel, stride, padding), nn.ReLU()]
            self.proj: nn.Module = nn.Sequential(*convs[:-1])
        else:
            self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.table_side**2, dim))
        self.cache = EvalCache()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table of a grid, (1, 1 + N, D)."""
        return self.cache.for_grid(self, self.pos_embed, (self.table_side, self.table_side), grid, prefix=1)

    def forward(self, image: Tensor, grid: Grid) -> Tensor:
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size, mode="bicubic", align_corners=False)
        patches = as_tokens(self.proj(image))
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype), patches], 1) + self.positions(grid)


class ClassAttention(nn.Module):
    """Attention from the first token to all tokens: (B, n, dim) -> (B, 1, dim)."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, scale: float | None = None):
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.wq, self.wk, self.wv = (Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = Linear(dim, dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(multi_head_attention(self.wq(z[:, :1]), self.wk(z), self.wv(z), self.num_heads, scale=self.scale))


class Fusion(nn.Module):
    """Pre-norm residual class attention, without an MLP: (B, n, dim) -> (B, 1, dim)."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, *, qkv_bias: bool = True, scale: float | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads, qkv_bias=qkv_bias, scale=scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:
        return z[:, :1] + self.drop_path(self.attn(self.norm1(z)))


def _projection(dim: int, other: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.GELU(), Linear(dim, other))


class Encoder(nn.Module):
    """Blocks of both branches followed by cross-attention of the class tokens: two of (B, 1 + N_i, D_i) -> the same shapes.

    Args:
        dims, num_heads, mlp_ratios: one value per branch.
        depths: blocks of each branch, and optionally those of each fusion.
        rates: stochastic depth rate of block i of both branches; the last entry is that of the fusion.
        fuse: whether to fuse the branches.
        qkv_bias: whether all projections to queries, keys and values have a bias.
        qk_scale: factor on the attention logits of the fusions; None: that of the width of a head.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        rates: Sequence[float],
        fuse: bool,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ):
        super().__init__()

        def block(branch: int, rate: float) -> nn.Module:
            attn = Attention(dims[branch], num_heads[branch], qkv_bias=qkv_bias)
            return TransformerBlock(dims[branch], num_heads[branch], mlp_ratio=mlp_ratios[branch], drop_path=rate, attn=attn)

        def fusion(branch: int) -> nn.Module:
            part = lambda: Fusion(dims[branch], num_heads[branch], rates[-1], qkv_bias=qkv_bias, scale=qk_scale)
            count = depths[2] if len(depths) > 2 else 0
            return nn.Sequential(*(part() for _ in range(count))) if count else part()  # 0: one, under the names of the releases

        self.blocks = nn.ModuleList(nn.ModuleList(block(branch, rates[i]) for i in range(depths[branch])) for branch in (0, 1))
        self.fuse = fuse
        if fuse:
            pairs = [(0, 1), (1, 0)]
            self.projs = nn.ModuleList(_projection(dims[a], dims[b]) for a, b in pairs)
            self.fusion = nn.ModuleList(fusion(b) for _, b in pairs)
            self.revert_projs = nn.ModuleList(_projection(dims[b], dims[a]) for a, b in pairs)

    def forward(self, branches: Pair, run: Callable[..., Tensor]) -> Pair:
        small, large = (run(blocks, tokens) for blocks, tokens in zip(self.blocks, branches, strict=True))
        if not self.fuse:
            return small, large
        return self._visited(0, small, large), self._visited(1, large, small)

    def _visited(self, number: int, own: Tensor, other: Tensor) -> Tensor:
        """Return the tokens of a branch with its class token after cross-attention to the other branch."""
        z = torch.cat([self.projs[number](own[:, :1]), other[:, 1:]], 1)
        return torch.cat([self.revert_projs[number](self.fusion[number](z)), own[:, 1:]], 1)


class BranchNorms(nn.Module):
    """Separate layer norms for the channels of the two branches: (..., D_0 + D_1) -> the same shape."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.dims = list(dims)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(part) for norm, part in zip(self.norms, x.split(self.dims, -1), strict=True)], -1)


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a checkpoint of the authors or of timm; the two heads are merged into one."""
    renamed = rename(
        (r"^(cls_token|pos_embed)[._](\d)$", r"branches.\2.\1"),
        (r"^patch_embed\.(\d)\.", r"branches.\1."),
        (r"^blocks\.(\d)\.", r"stages.\1."),
        (r"^norm\.(\d)\.", r"norm.norms.\1."),
    )(state)
    for kind in ("weight", "bias"):
        if f"head.0.{kind}" in renamed:
            both = [renamed.pop(f"head.{number}.{kind}") / 2 for number in (0, 1)]
            renamed[f"head.{kind}"] = torch.cat(both, 1) if kind == "weight" else both[0] + both[1]
    return renamed


def _row(dims: tuple[int, int], heads: int, depth: int, ratio: int, **options: Any) -> dict[str, Any]:
    return dict(dims=dims, depths=((1, depth),) * 3, num_heads=(heads, heads), mlp_ratios=(ratio, ratio), **options)


_DAGGER: dict[str, Any] = dict(multi_conv=True)
_384: dict[str, Any] = dict(multi_conv=True, image_size=408, large_size=384)


@family(
    "crossvit",
    variants={
        "pico": dict(
            dims=(32, 48), depths=((1, 2), (1, 1)), num_heads=(2, 3), mlp_ratios=(2, 2), patch_sizes=(2, 4), large_size=16, image_size=16
        ),
        "tiny": _row((96, 192), 3, 4, 4, image_size=240),  # 7.0 M
        "small": _row((192, 384), 6, 4, 4, image_size=240),  # 26.9 M
        "base": _row((384, 768), 12, 4, 4, image_size=240),  # 105 M
        "9": _row((128, 256), 4, 3, 3, image_size=240),  # 8.6 M
        "9_dagger": _row((128, 256), 4, 3, 3, image_size=240, **_DAGGER),  # 8.8 M
        "15": _row((192, 384), 6, 5, 3, image_size=240),  # 27.5 M
        "15_dagger": _row((192, 384), 6, 5, 3, image_size=240, **_DAGGER),  # 28.2 M
        "15_dagger_384": _row((192, 384), 6, 5, 3, **_384),  # 28.5 M
        "18": _row((224, 448), 7, 6, 3, image_size=240),  # 43.3 M, 82.5 % top-1
        "18_dagger": _row((224, 448), 7, 6, 3, image_size=240, **_DAGGER),  # 44.3 M, 82.8 %
        "18_dagger_384": _row((224, 448), 7, 6, 3, **_384),  # 44.6 M
    },
    official=official,
    weights={
        name: {"in1k": (f"timm:crossvit_{name.replace('384', '408') if name.endswith('384') else name + '_240'}.in1k",)}
        for name in ("tiny", "small", "base", "9", "9_dagger", "15", "15_dagger", "15_dagger_384", "18", "18_dagger", "18_dagger_384")
    },
    crop_pct=0.875,
)
class CrossViT(Backbone):
    """CrossViT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Features are tokens (B, 1 + N_1, D_0 + D_1): the two class tokens concatenated, then the tokens of the small patches averaged over each
    large patch, concatenated with the tokens of the large patches. `forward_branches` returns the tokens of both branches,
    `forward_intermediates` maps.

    The arguments are over 15 so that the authors' configs can be expressed.

    Args:
        dims: channels of the branches.
        depths: for each encoder, the number of blocks of the two branches, and optionally of blocks of cross-attention in each fusion that
            follows, of which the second and later ones see the class token alone (none, or 0: one block, under the names of the releases).
        num_heads, mlp_ratios: one value per branch.
        patch_sizes: sides of the patches, pixels.
        image_size: side, in pixels, of the square image that the position table of the small branch is made for.
        large_size: side to which that image is resized for the large branch; other images are resized in proportion.
        fixed_sizes: whether every image is resized to these sizes, whatever its own.
        multi_conv: patch embeddings of three convolutions (the "dagger" models).
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the attention logits of the fusions, not of the blocks, as in the authors' code; None: (D / num_heads) ** -0.5.
        fuse: whether to fuse the branches; False gives two ViTs whose logits are averaged.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: not two branches, sizes that are not divisible by the patch size, or `multi_conv` with patches other than 12 and 16.
    """

    pools = ("token", *POOLS)

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[Sequence[int]],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        patch_sizes: Sequence[int] = (12, 16),
        image_size: int = 240,
        large_size: int | None = None,
        fixed_sizes: bool = False,
        multi_conv: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        fuse: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        sizes = (image_size, large_size or round(image_size * 14 / 15))
        _check(dims, depths, num_heads, mlp_ratios, patch_sizes, sizes, multi_conv)
        stages = [Stage(sum(dims), patch_sizes[1] * sizes[0] // sizes[1])] * len(depths)
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.large_over_small = sizes[1] / sizes[0]
        self.fixed_sizes = fixed_sizes
        self.branches = nn.ModuleList(
            Branch(patch, size, dim, in_chans, multi_conv) for patch, size, dim in zip(patch_sizes, sizes, dims, strict=True)
        )
        counts = [max(depth[:2]) + sum(depth[2:]) for depth in depths]
        rates = iter(torch.linspace(0, drop_path_rate, sum(counts), device="cpu").tolist())
        self.stages = nn.ModuleList(
            Encoder(dims, depth, num_heads, mlp_ratios, [next(rates) for _ in range(count)], fuse, qkv_bias, qk_scale)
            for depth, count in zip(depths, counts, strict=True)
        )
        self.norm = BranchNorms(dims)
        self.global_pool = "token"
        init_weights(self, conv=False)

    def grids(self, height: int, width: int) -> tuple[Grid, Grid]:
        """Return the rows and columns of patches of the two branches."""
        if self.fixed_sizes:
            first, second = ((branch.table_side, branch.table_side) for branch in self.branches)
            return cast(Grid, first), cast(Grid, second)
        patches = [branch.patch_size for branch in self.branches]

        def one(side: int, patch: Any, scale: float) -> int:
            return max(1, round(side * scale / patch))

        small, large = (
            (one(height, patch, scale), one(width, patch, scale))
            for patch, scale in zip(patches, (1.0, self.large_over_small), strict=True)
        )
        return small, large

    def forward_branches(self, image: Tensor) -> Pair:
        """Return the tokens of both branches after the last encoder and the norm: (B, 1 + N_0, D_0) and (B, 1 + N_1, D_1)."""
        self.check_image(image)
        for both in self._encoders(image):  # noqa: B007
            pass
        first, second = self.norm.norms  # type: ignore[union-attr,misc]
        return first(both[0]), second(both[1])

    def _encoders(self, image: Tensor) -> Iterator[Pair]:
        grids = self.grids(*image.shape[-2:])
        small, large = (branch(image, grid) for branch, grid in zip(self.branches, grids, strict=True))
        both = (small, large)
        for stage in self.stages:
            both = stage(both, self.run_blocks)
            yield both

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens of both branches after each encoder on the grid of the large patches, (B, 1 + N_1, D_0 + D_1)."""
        fine, coarse = self.grids(*image.shape[-2:])
        for small, large in self._encoders(image):
            there = as_tokens(F.adaptive_avg_pool2d(as_map(small[:, 1:], fine), coarse))
            yield torch.cat([torch.cat([small[:, :1], there], 1), large], 2)

    def as_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        return as_map(features[:, 1:], self.grids(*image_size)[1])

    def pool(self, features: Tensor) -> Tensor:
        """Return the class tokens ("token"), or the mean or maximum of the other tokens: (B, 1 + N, D) -> (B, D)."""
        return features[:, 0] if self.global_pool == "token" else POOLS[self.global_pool](features[:, 1:].transpose(1, 2))

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        if not name.endswith("pos_embed"):
            return None
        side = math.isqrt(shape[1] - 1)
        return fit_position_table(tensor, shape, (side, side), prefix=1)


def _check(
    dims: Sequence[int],
    depths: Sequence[Sequence[int]],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    patch_sizes: Sequence[int],
    sizes: Sequence[int],
    multi_conv: bool,
) -> None:
    if any(len(row) != 2 for row in (dims, num_heads, mlp_ratios, patch_sizes)) or any(len(row) not in (2, 3) for row in depths):
        raise ValueError("dims, num_heads, mlp_ratios, patch_sizes and each of depths need two values, one per branch (depths: or three)")
    for size, patch in zip(sizes, patch_sizes, strict=True):
        if size % patch:
            raise ValueError(
                f"the image size of a branch must be divisible by its patch size {patch}, got {size}; try {size - size % patch}"
            )
    if multi_conv and any(patch not in CONVOLUTIONS for patch in patch_sizes):
        raise ValueError(f"multi_conv needs patches of {' or '.join(map(str, CONVOLUTIONS))} pixels, got {list(patch_sizes)}")
