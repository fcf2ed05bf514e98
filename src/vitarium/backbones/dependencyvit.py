"""DependencyViT: attention that runs backwards, so that a tree of parts appears (Ding et al., "Visual Dependency Transformers", CVPR 2023).

The idea: in a ViT each token takes from others; here each token (a child) gives: it has one unit of message, distributes it over the tokens
it wants to reach (its parents), and a token's new value is the sum of what it receives. A selector says by which head a token sends, a
controller whether it sends at all; who has stopped once stays silent. Whom a token sends most to is its parent: that is a tree over the
patches, learned without labels, whose leaves can be left out.

    F = softmax_j(q_i k_j / sqrt(d))          row i: how child i's unit is distributed over the parents j
    p_i = softmax_h(W_p x_i / 0.1)            a nearly hard choice of one head
    m_i = m_i(layer before) sigmoid(MLP(x_i) + b)                                           m_i = 1 in the beginning
    y_j = sum_i F_h[i, j] p_i[h] m_i v_i      for each head h;   x = x + LS(W_o y), then the MLP as usual
    A[j, i] = sum_h F_h[i, j] p_i[h] m_i      the dependency mask: what parent j has of child i; column i sums to m_i

`dependencyvit_lite_*` drop tokens: between attention and MLP of four blocks the tokens that received least leave, 16 % of all at a time, so
that 36 % go through the last blocks. Their number depends on the image's size alone: shapes are static, and the model compiles and exports.

No code was published. Followed: the paper's abstract and figures, and for what they leave open an unmerged third-party port to timm (no
biases in selector and controller; received mass decides who leaves; mean of m_i x_i as the image's feature, `pool="mean"`).
Free choices of ours, all switchable: b = 4 inside the controller's sigmoid (`message_bias`; with 0, as in the port, half of the messages
are lost in each fresh layer, and 0.02 % arrive behind the twelfth); the feature is sum m_i x_i / sum m_i (`pool="weighted"`); the tree is
the spanning arborescence of the mean mask that weighs most. Any image size, square or not: the position table is resampled.
Cost: quadratic in tokens. The fused attention kernel cannot be used, because the matrix is transposed between softmax and product.

How it is fast: p and m scale a message before it is sent, N d numbers and not N^2; what is received is one more channel of the messages;
in plain inference the matrix is made in pieces that fit the cache and are dropped at once, so that memory grows with N.

Legend: B batch, N patches (n of them left), C channels, H heads, d = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitarium.catalog import family, rename
from vitarium.nn import DropPath, EvalCache, LayerScale, Linear, Mlp, PatchEmbed, TokenBackbone, drop_path_rates, init_weights
from vitarium.nn.positions import resize_position_table
from vitarium.ops.merging import rows
from vitarium.ops.reversed_product import reversed_product
from vitarium.ops.sorting import descending_order
from vitarium.ops.token_tree import TokenTree, grow_tree

TEMPERATURE = 0.1
"""Of the head selector (the paper's appendix D.1)."""
EPS = 1e-6
"""Of every norm."""
POOLINGS = ("weighted", "mean")
SCORES = ("received", "messages")

Grid = tuple[int, int]


class MessageController(nn.Module):
    """Whether a token sends: (B, N, dim) -> (B, N) in (0, 1), single precision at least."""

    def __init__(self, dim: int, bias: float):
        super().__init__()
        self.bias = bias
        self.fc1 = Linear(dim, dim // 2, bias=False)
        self.act = nn.GELU()
        self.fc2 = Linear(dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (_precise(self.fc2(self.act(self.fc1(x)))[..., 0]) + self.bias).sigmoid()


class ReversedAttention(nn.Module):
    """Tokens send: (B, N, dim) -> (B, N, dim). Takes the place of a ViT's attention, whose `qkv` and `proj` it can be given; mind that the
    softmax runs over the receivers.

    Args:
        dim, num_heads: channels and heads.
        qkv_bias: as for `vitarium.nn.Attention`.
        qk_norm: norm class on each head's queries and keys, or None.
        message_bias: b.

    Raises:
        ValueError: dim does not divide by num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = False, qk_norm: type[nn.Module] | None = None, message_bias: float = 4.0
    ):
        if dim % num_heads:
            raise ValueError(f"dim must divide by num_heads, got {dim} and {num_heads}")
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.head_selector = Linear(dim, num_heads, bias=False)
        self.message_controller = MessageController(dim, message_bias)

    def forward(self, x: Tensor, messages: Tensor, count: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            x: tokens, (B, N, dim).
            messages: m of the layer before, (B, N).
            count: whether what each token receives is wanted.

        Returns:
            tokens (B, N, dim), m (B, N), and sum over heads and children of A^R (B, N) or None.
        """
        q, k, v, weight, messages = self._parts(x, messages)
        weight = weight.to(v.dtype)[..., None]
        sent = torch.cat([v * weight, weight], -1) if count else v * weight
        received = reversed_product(q, k, sent)
        mass = received[..., -1].sum(1) if count else None
        return self.proj(received[..., : self.head_dim].transpose(1, 2).flatten(2)), messages, mass

    def dependency_mask(self, x: Tensor, messages: Tensor) -> Tensor:
        """A, (B, N, N) as [parent, child], written out: for trees, pictures and measurements. Arguments as in `forward`."""
        q, k, _, weight, _ = self._parts(x, messages)
        forward = _precise(q @ k.transpose(-2, -1)).softmax(-1)
        return (forward * weight[..., None]).sum(1).transpose(1, 2)

    def _parts(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries, keys, values (B, H, N, d), p m (B, H, N) and m (B, N)."""
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        messages = messages * self.message_controller(x)
        heads = (_precise(self.head_selector(x)) / TEMPERATURE).softmax(-1)
        weight = (heads * messages[..., None]).transpose(1, 2)
        return self.q_norm(q) * self.head_dim**-0.5, self.k_norm(k), v, weight, messages


def _precise(x: Tensor) -> Tensor:
    """At least single precision: products of many gates leave the range of half precision."""
    return x if x.dtype is torch.float64 else x.float()


class Flow(NamedTuple):
    """What goes from block to block."""

    tokens: Tensor
    """(B, n, C)"""
    messages: Tensor
    """m, (B, n)"""
    place: Tensor | None = None
    """(B, n) int64, the patch that each token is; None while all are there."""
    last: Tensor | None = None
    """(B, N, C) the value of every token when some left for the last time."""

    def restored(self) -> Tensor:
        """(B, N, C): tokens that left have the value they left with."""
        if self.place is None or self.last is None:
            return self.tokens
        return self.last.scatter(1, _over_channels(self.place, self.tokens), self.tokens)


def _over_channels(place: Tensor, tokens: Tensor) -> Tensor:
    return place[..., None].expand(-1, -1, tokens.shape[-1])


class DependencyBlock(nn.Module):
    """Reversed attention, perhaps a farewell to some tokens, MLP: Flow -> Flow.

    Args:
        dim, num_heads: channels and heads.
        attn: the attention.
        mlp_ratio: hidden channels of the MLP over dim.
        layer_scale: first value of the residual branches' factors.
        drop_path: stochastic depth of both branches.
        keep: share of the tokens that stay, (0, 1].
        prune_by: see `DependencyViT`.
    """

    def __init__(
        self, dim: int, attn: ReversedAttention, *, mlp_ratio: float, layer_scale: float, drop_path: float, keep: float, prune_by: str
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.keep, self.prune_by = keep, prune_by

    def forward(self, flow: Flow) -> Flow:
        sent, messages, received = self.attn(self.norm1(flow.tokens), flow.messages, self.keep < 1)
        flow = flow._replace(tokens=flow.tokens + self.drop_path(self.ls1(sent)), messages=messages)
        if received is not None:
            flow = self.prune(flow, self.score(received, messages))
        return flow._replace(tokens=flow.tokens + self.drop_path(self.ls2(self.mlp(self.norm2(flow.tokens)))))

    def score(self, received: Tensor, messages: Tensor) -> Tensor:
        """Who stays before whom, (B, n): the larger."""
        return received if self.prune_by == "received" else messages

    def prune(self, flow: Flow, score: Tensor) -> Flow:
        """The best tokens, in the order they stood in. Nothing is learned from the choice itself."""
        left = max(1, math.floor(self.keep * score.shape[1]))
        stay = descending_order(score.detach())[:, :left].sort(-1).values
        place = stay if flow.place is None else flow.place.gather(1, stay)
        return Flow(rows(flow.tokens, stay), flow.messages.gather(1, stay), place, flow.restored())


class ReadOut(nn.LayerNorm):
    """The last norm, and the tokens weighed by what they still send: Flow -> (B, N, C), whose plain mean over N is the image's feature.

    Weights are m over its mean ("weighted") or m itself ("mean"); tokens that left weigh nothing, those that stayed N / n times as much.
    """

    def __init__(self, dim: int, pool: str):
        super().__init__(dim, eps=EPS)
        self.weighted = pool == "weighted"

    def forward(self, flow: Flow) -> Tensor:  # type: ignore[override]
        weight = flow.messages
        if self.weighted:
            weight = weight / weight.mean(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        x = super().forward(flow.tokens)
        x = x * weight[..., None].to(x.dtype)
        if flow.place is None or flow.last is None:
            return x
        share = flow.last.shape[1] / x.shape[1]
        return torch.zeros_like(flow.last, dtype=x.dtype).scatter(1, _over_channels(flow.place, x), share * x)


@dataclass(frozen=True)
class Dependency:
    """Who sent how much to whom, in each layer.

    Args:
        masks: for each layer (B, n, n), [parent, child], over the tokens that were there; columns sum to m.
        places: for each layer (B, n) int64, the patches that these tokens are.
        messages: (B, N) m of the last layer that each token was in.
        grid, patch_size, size: h and w, side of a patch, height and width of the image in pixels.
    """

    masks: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    messages: Tensor
    grid: Grid
    patch_size: int
    size: tuple[int, int]

    def mean_mask(self, layers: Sequence[int] | None = None) -> Tensor:
        """(B, N, N): the mean over layers (numbered from 0, negative from the end; None: all). Who has left sends nothing.

        Raises:
            ValueError: no layer, or one that is not there.
        """
        depth = len(self.masks)
        chosen = list(range(depth)) if layers is None else list(layers)
        if not chosen or any(not -depth <= i < depth for i in chosen):
            raise ValueError(f"layers are numbers from 0 to {depth - 1} (negative from the end), at least one; got {list(chosen)}")
        batch, count = self.messages.shape
        total = self.masks[0].new_zeros(batch, count, count)
        for mask, place in ((self.masks[i], self.places[i]) for i in chosen):
            wide = mask.new_zeros(batch, count, mask.shape[2]).scatter(1, _over_channels(place, mask), mask)
            total = total.scatter_add(2, place[:, None].expand(-1, count, -1), wide)
        return total / len(chosen)


def build_tree(dependency: Dependency, index: int = 0, layers: Sequence[int] | None = None) -> TokenTree:
    """The dependency tree of one image: parts, saliency, picture (see `vitarium.ops.token_tree`).

    Args:
        dependency: from `model(image, return_dependency=True)`.
        index: which image of the batch.
        layers: as for `Dependency.mean_mask`.
    """
    mask = dependency.mean_mask(layers)[index].detach().double().cpu().numpy()
    return grow_tree(mask, dependency.grid, dependency.patch_size, dependency.size)


def from_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's or DeiT's state under timm's names -> what it shares with ours: without class token and its position."""
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
    official=rename(),  # the names of the port are ours
    dialects={"timm": from_vit},
    **HALF,
)
class DependencyViT(TokenBackbone):
    """Image (B, in_chans, H, W), any H and W -> logits (B, num_classes).

    `forward_features` gives the tokens in their places, weighed so that their mean is the image's feature (see `ReadOut`);
    `forward_intermediates` gives them as they are, those that left with the value they left with.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        patch_size: side of a patch, pixels.
        image_size: side of the square image that the position table is made for, pixels.
        mlp_ratio: hidden channels of the MLPs over embed_dim.
        qkv_bias: whether queries, keys and values have one; a ViT's weights ask for it.
        qk_norm: whether each head's queries and keys are normed.
        message_bias: b inside the controller's sigmoid; 4 keeps 0.8 of the messages through twelve fresh layers.
        layer_scale: first value of the residual branches' factors.
        pool: how the tokens become a feature: "weighted" by m, or the "mean" of m times token.
        prune_blocks: numbers of the blocks, from 0, in which tokens leave.
        prune_share: how many leave in each of them, over all N.
        prune_by: who leaves first: who "received" least, or who sends the smallest "messages" m.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.

    Raises:
        ValueError: a value that is not among those named, a block that is not there, or no token left.
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
        """Logits (B, num_classes); with `return_dependency` a pair of them and of who depended on whom (`Dependency`)."""
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
        """The tree of each image (B, in_chans, H, W); see `build_tree`."""
        _, dependency = self(image, return_dependency=True)
        return [build_tree(dependency, i, layers) for i in range(len(image))]

    def embed(self, image: Tensor) -> Flow:
        """Patches with their positions, all of them sending."""
        grid = self.patch_embed.grid(*image.shape[-2:])
        return start(self.patch_embed(image).flatten(2).transpose(1, 2) + self.positions(grid))

    def forward_stages(self, image: Tensor) -> Iterator[Any]:
        """Yields the `Flow` after each block."""
        yield from self.flow(self.embed(image))

    def flow(self, flow: Any) -> Iterator[Any]:
        """The `Flow` after each block, of the one before the first."""
        for block in self.blocks:
            flow = self.run_blocks([block], flow)
            yield flow

    def as_map(self, features: Any, image_size: Sequence[int]) -> Tensor:
        """A `Flow`, or the tokens that `forward_features` gives, as (B, C, h, w)."""
        return super().as_map(features.restored() if isinstance(features, Flow) else features, image_size)

    def class_places(self, patches: int) -> list[int]:
        return []

    def positions(self, grid: Grid) -> Tensor:
        """The position table of a grid, (1, N, C); resampled where it is not the one that the model was made for."""
        if grid == self.table_grid:
            return self.pos_embed
        return self.cache.get(self, grid, self.pos_embed, lambda: resize_position_table(self.pos_embed, self.table_grid, grid))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """A checkpoint's position table for this model's grid; None for any other tensor that does not fit."""
        side = math.isqrt(tensor.shape[1]) if tensor.ndim == 3 else 0
        if name != "pos_embed" or tensor.shape[2:] != shape[2:] or side**2 != tensor.shape[1]:
            return None
        return resize_position_table(tensor, (side, side), self.table_grid)


def start(tokens: Tensor) -> Flow:
    """Tokens (B, N, C), all of them sending."""
    return Flow(tokens, _precise(torch.ones_like(tokens[..., 0])))


def kept_shares(depth: int, prune_blocks: Sequence[int], prune_share: float) -> list[float]:
    """How much of its tokens each block keeps, so that each of `prune_blocks` takes away the same number of tokens.

    Raises:
        ValueError: a block that is not there, or twice, or nobody would be left.
    """
    steps = sorted(set(prune_blocks))
    if len(steps) < len(prune_blocks) or any(not 0 <= block < depth for block in steps):
        raise ValueError(f"prune_blocks are different numbers from 0 to {depth - 1}, got {list(prune_blocks)}")
    if prune_share < 0 or prune_share * len(steps) >= 1:
        raise ValueError(f"prune_share times {len(steps)} pruning blocks must lie in [0, 1), so that tokens are left; got {prune_share}")
    keep = [1.0] * depth
    for step, block in enumerate(steps, start=1):
        keep[block] = (1 - step * prune_share) / (1 - (step - 1) * prune_share)
    return keep
