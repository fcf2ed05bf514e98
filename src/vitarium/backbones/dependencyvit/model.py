"""DependencyViT and DependencyViT-Lite.

Legend: as in the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.backbones.dependencyvit.attention import ReversedAttention
from vitarium.backbones.dependencyvit.blocks import DependencyBlock, Flow, ReadOut, start
from vitarium.backbones.dependencyvit.dependency import Dependency, build_tree
from vitarium.catalog import family, rename
from vitarium.nn import EvalCache, PatchEmbed, TokenBackbone, drop_path_rates, init_weights
from vitarium.nn.positions import fit_position_table
from vitarium.ops.maps import as_tokens
from vitarium.ops.token_tree import TokenTree

POOLINGS = ("weighted", "mean")
SCORES = ("received", "messages")

Grid = tuple[int, int]


def from_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ViT or DeiT state with timm's names: drop the class token and its position."""
    shared = {name: tensor for name, tensor in state.items() if name not in ("cls_token", "dist_token")}
    prefix = len(state) - len(shared)
    return shared | {"pos_embed": state["pos_embed"][:, prefix:]}


LITE: dict[str, Any] = dict(prune_blocks=(1, 4, 7, 10), prune_share=0.16)
PICO: dict[str, Any] = dict(embed_dim=64, num_heads=4, depth=4, patch_size=4, layer_scale=0.1, image_size=16)
TINY: dict[str, Any] = dict(embed_dim=192, num_heads=12)  # 5.96 M, 1.30 GMACs; Lite 0.85
SMALL: dict[str, Any] = dict(embed_dim=384, num_heads=12)  # 22.99 M, 4.76 GMACs; Lite 3.14
HALF: dict[str, Any] = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@family(
    "dependencyvit",
    name="dependencyvit_lite",
    variants={
        "pico": dict(**PICO, prune_blocks=(1, 2), prune_share=0.25),
        "tiny": dict(**TINY, **LITE),
        "small": dict(**SMALL, **LITE),
    },
    official=rename(),
    dialects={"timm": from_vit},
    **HALF,
)
@family(
    "dependencyvit",
    variants={"pico": PICO, "tiny": TINY, "small": SMALL},
    official=rename(),  # same names as the port
    dialects={"timm": from_vit},
    **HALF,
)
class DependencyViT(TokenBackbone):
    """DependencyViT classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    `forward_features` returns all tokens, weighted so that their mean is the image feature (see `ReadOut`); `forward_intermediates` returns
    them unweighted, pruned tokens with the value with which they were pruned.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        patch_size: side of a patch, pixels.
        image_size: side, in pixels, of the square image that the position table is made for.
        mlp_ratio: ratio of the MLP's hidden channels to embed_dim.
        qkv_bias: whether the projections to queries, keys and values have a bias; needed for the weights of a ViT.
        qk_norm: whether to norm the queries and keys of each head.
        message_bias: b inside the controller's sigmoid; 4 keeps 0.8 of the messages through twelve newly initialised layers.
        layer_scale: initial value of the layer scales.
        pool: image feature: mean of the tokens "weighted" by m, or "mean" of m times token.
        prune_blocks: indices of the blocks, from 0, that prune tokens.
        prune_share: share of all N tokens that each of them prunes.
        prune_by: pruning score: the "received" mass, or the "messages" m.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: an unknown pool or prune_by, a block index out of range, or no token would remain.
    """

    pools = ("avg",)

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        depth: int = 12,
        patch_size: int = 16,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        message_bias: float = 4.0,
        layer_scale: float = 1e-6,
        pool: str = "weighted",
        prune_blocks: Sequence[int] = (),
        prune_share: float = 0.0,
        prune_by: str = "received",
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        for name, value, accepted in (("pool", pool, POOLINGS), ("prune_by", prune_by, SCORES)):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
        keep = kept_shares(depth, prune_blocks, prune_share)
        super().__init__(dim=embed_dim, depth=depth, stride=patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.global_pool = "avg"
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.table_grid = self.patch_embed.grid(image_size, image_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.table_grid[0] * self.table_grid[1], embed_dim))
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        norm = nn.LayerNorm if qk_norm else None
        self.blocks = nn.ModuleList(
            DependencyBlock(
                embed_dim,
                ReversedAttention(embed_dim, num_heads, qkv_bias=qkv_bias, qk_norm=norm, message_bias=message_bias),
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                drop_path=rate,
                keep=share,
                prune_by=prune_by,
            )
            for rate, share in zip(rates, keep, strict=True)
        )
        self.norm = ReadOut(embed_dim, pool)
        init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor, return_dependency: bool = False) -> Any:
        """Return the logits (B, num_classes); with `return_dependency`, a pair of the logits and a `Dependency`."""
        if not return_dependency:
            return super().forward(image)
        self.check_image(image)
        flow = self.embed(image)
        everyone = torch.arange(flow.tokens.shape[1], device=image.device).expand(flow.messages.shape)
        sent, masks, places = flow.messages, [], []
        for block in self.blocks:
            mask = block.attn.dependency_mask(block.norm1(flow.tokens), flow.messages)  # type: ignore[operator, union-attr]
            masks.append(mask)
            places.append(everyone if flow.place is None else flow.place)
            sent = sent.scatter(1, places[-1], mask.sum(1))
            flow = block(flow)
        size = (image.shape[-2], image.shape[-1])
        found = Dependency(tuple(masks), tuple(places), sent, self.patch_embed.grid(*size), self.patch_embed.patch_size, size)
        return self.forward_head(self.norm(flow)), found

    @torch.no_grad()
    def dependency_trees(self, image: Tensor, layers: Sequence[int] | None = None) -> list[TokenTree]:
        """Return the dependency tree of each image (B, in_chans, H, W); see `build_tree`."""
        _, dependency = self(image, return_dependency=True)
        return [build_tree(dependency, i, layers) for i in range(len(image))]

    def embed(self, image: Tensor) -> Flow:
        """Return the initial `Flow` of images: patches with their positions."""
        grid = self.patch_embed.grid(*image.shape[-2:])
        return start(as_tokens(self.patch_embed(image)) + self.positions(grid))

    def forward_stages(self, image: Tensor) -> Iterator[Any]:
        """Yield the `Flow` after each block."""
        yield from self.flow(self.embed(image))

    def flow(self, flow: Any) -> Iterator[Any]:
        """Yield the `Flow` after each block, given the one before the first."""
        for block in self.blocks:
            flow = self.run_blocks([block], flow)
            yield flow

    def as_map(self, features: Any, image_size: Sequence[int]) -> Tensor:
        """Return a `Flow`, or the tokens from `forward_features`, as a map (B, C, h, w)."""
        return super().as_map(features.restored() if isinstance(features, Flow) else features, image_size)

    def class_places(self, patches: int) -> list[int]:
        return []

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table of a grid, (1, N, C), resampled unless the model was made for this grid."""
        return self.cache.for_grid(self, self.pos_embed, self.table_grid, grid)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        return fit_position_table(tensor, shape, self.table_grid) if name == "pos_embed" else None


def kept_shares(depth: int, prune_blocks: Sequence[int], prune_share: float) -> list[float]:
    """Return the share of its tokens that each block keeps, such that each of `prune_blocks` prunes the same number of tokens.

    Raises:
        ValueError: a block index out of range or given twice, or no token would remain.
    """
    steps = sorted(set(prune_blocks))
    if len(steps) < len(prune_blocks) or any(not 0 <= block < depth for block in steps):
        raise ValueError(f"prune_blocks must be distinct indices from 0 to {depth - 1}, got {list(prune_blocks)}")
    if prune_share < 0 or prune_share * len(steps) >= 1:
        raise ValueError(f"prune_share times {len(steps)} pruning blocks must lie in [0, 1), so that tokens remain; got {prune_share}")
    keep = [1.0] * depth
    for step, block in enumerate(steps, start=1):
        keep[block] = (1 - step * prune_share) / (1 - (step - 1) * prune_share)
    return keep
