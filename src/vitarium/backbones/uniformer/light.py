"""UniFormer's light models: global blocks that process the tokens with the highest attention from the class token (as in Evo-ViT).

Legend: B batch, C channels, S the axes of a map (H, W or T, H, W), N tokens of a map, n processed tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.backbones.uniformer.blocks import (
    BATCH_NORM,
    OFFICIAL,
    Convolutions,
    GlobalBlock,
    LocalBlock,
    Patches,
    channels_first,
    channels_last,
    check_stages,
    gamma,
)
from vitarium.catalog import family
from vitarium.nn import Attention, Backbone, Linear, PyramidStage, Stage, VideoBackbone, drop_path_rates, init_weights, per_stage
from vitarium.nn.backbone import init_head
from vitarium.ops.attention import merge_heads, split_packed_heads
from vitarium.ops.sorting import descending_order


def normalised(score: Tensor) -> Tensor:
    """Normalise non-negative scores (B, n) to a sum of 1; all-zero rows stay zero."""
    return score / score.sum(1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


class ScoringAttention(Attention):
    """Self-attention that also returns the attention of the first token to the others: (B, N, C) -> (B, N, C) and (B, N - 1)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = split_packed_heads(self.qkv(x), 3, self.num_heads)
        wide = torch.promote_types(q.dtype, torch.float32)  # small scores are compared with each other
        seen = (q[:, :, :1].to(wide) * self.scale @ k.transpose(-1, -2).to(wide)).softmax(-1).mean(1)[:, 0, 1:]
        x = merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        return F.dropout(self.proj(x), self.proj_drop, self.training), seen


Tokens = tuple[Tensor, Tensor, Tensor | None]
"""Map (B, C, S), class token (B, 1, C), score of each token (B, N) or None before the first block."""


class EvolvingBlock(GlobalBlock):
    """Global block that processes the tokens with the highest scores and one token for all others: Tokens -> Tokens.

    Args:
        keep_ratio: share of the tokens that are processed; 1 for all. May be changed at any time.
        trade_off: weight of this block's attention of the class token in the updated score.
    """

    attention_class = ScoringAttention

    def __init__(self, dim: int, axes: int, head_dim: int, *, keep_ratio: float, trade_off: float = 0.5, **options: Any):
        super().__init__(dim, axes, head_dim, **options)
        self.keep_ratio, self.trade_off = keep_ratio, trade_off
        self.gamma_3 = gamma(dim, options["layer_scale"]) if keep_ratio < 1 else None

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]
        x, cls, score = tokens
        x = channels_last(x + self.pos_embed(x))
        shape, x = x.shape, x.flatten(1, -2)
        if score is None or self.keep_ratio == 1:
            y, seen, _ = self.mix(torch.cat((cls, x), 1))
            score = seen if score is None else torch.lerp(score, seen, self.trade_off)
            return channels_first(y[:, 1:].view(shape)), y[:, :1], score
        count = int(x.shape[1] * self.keep_ratio)
        order = descending_order(score)
        score, spread = score.gather(1, order), order[..., None].expand_as(x)
        kept, rest = x.gather(1, spread).tensor_split((count,), 1)
        share = normalised(score[:, count:]).to(x.dtype)
        y, seen, moved = self.mix(torch.cat((cls, kept, share[:, None] @ rest), 1))
        score = torch.cat((torch.lerp(score[:, :count], seen[:, :-1], self.trade_off), score[:, count:]), 1)
        rest = rest + (moved if self.gamma_3 is None else moved * self.gamma_3)
        x = torch.zeros_like(x).scatter(1, spread, torch.cat((y[:, 1:-1], rest), 1))
        return channels_first(x.view(shape)), y[:, :1], torch.zeros_like(score).scatter(1, order, score)

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens (B, n, C), the attention of the class token to the others (B, n - 1), and the change of the last (B, 1, C)."""
        a, seen = self.attn(self.norm1(x))
        x = x + self.branch(a, self.gamma_1)
        m = self.mlp(self.norm2(x))
        return x + self.branch(m, self.gamma_2), seen, a[:, -1:] + m[:, -1:]


class EvolvingStage(PyramidStage):
    """Global stage with a projection of the class token to its width: Tokens -> Tokens."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], in_dim: int | None, dim: int):
        super().__init__(downsample, blocks)
        self.cls_upsample = Linear(in_dim, dim) if in_dim else nn.Identity()

    def forward(self, tokens: Tokens, run: Callable[..., Any]) -> Tokens:  # type: ignore[override]
        x, cls, score = tokens
        if score is not None:  # average over 2 x 2 cells of a map, or of each frame of a clip, with the sum unchanged
            pooled = F.avg_pool2d(score.view(x.shape[0], -1, *x.shape[-2:]), 2).flatten(1)
            score = normalised(pooled) * score.sum(1, keepdim=True)
        return run(self.blocks, (self.downsample(x), self.cls_upsample(cls), score))


def check_keeps(keeps: Sequence[float], count: int) -> list[float]:
    """Return one keep ratio per global block.

    Raises:
        ValueError: another number of ratios, one outside (0, 1], or a first one below 1.
    """
    if len(keeps) != count or keeps[0] != 1 or not all(0 < keep <= 1 for keep in keeps):
        raise ValueError(
            f"keep_ratio is a number, or {count} numbers in (0, 1] of which the first is 1 (one per global block), got {list(keeps)}"
        )
    return list(keeps)


def check_mixers(mixers: str) -> int:
    """Return the number of local stages.

    Raises:
        ValueError: a local stage after a global one, or no global stage.
    """
    if not re.fullmatch("L*G+", mixers):
        raise ValueError(f"mixers must list the local stages first, such as 'LLGG', got {mixers!r}")
    return mixers.index("G")


class LightModel(Backbone):
    """Parts and passes that the light models of images and clips share; see their arguments."""

    def build(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: str,
        head_dim: int,
        *,
        axes: int,
        mlp_ratio: float | Sequence[float],
        keep_ratio: float | Sequence[float],
        trade_off: float | Sequence[float],
        heads: dict[str, Any],
        common: dict[str, Any],
        frames: int,
        drop_path_rate: float,
    ) -> None:
        """Build stages, class token, norms and the second head; `heads` are options of global blocks, `common` those of all.

        `frames` are those of a patch between stages.
        """
        first = check_mixers(mixers)
        count, ratios = sum(depths[first:]), per_stage(mlp_ratio, len(dims), "mlp_ratio")
        weights = iter(per_stage(trade_off, count, "trade_off"))
        same = keep_ratio if isinstance(keep_ratio, float | int) else None
        keeps = iter(check_keeps(keep_ratio, count) if isinstance(keep_ratio, Sequence) else [1.0, *[keep_ratio] * (count - 1)])
        self.stages = nn.ModuleList()
        for k, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            between = Patches(dims[k - 1], dims[k], 2, axes=axes, frames=frames) if k else nn.Identity()
            own = dict(mlp_ratio=ratios[k], **common)
            if k < first:
                self.stages.append(PyramidStage(between, [LocalBlock(dims[k], axes, **own, drop_path=rate) for rate in rates]))
                continue
            blocks = [
                EvolvingBlock(dims[k], axes, head_dim, keep_ratio=next(keeps), trade_off=next(weights), drop_path=rate, **heads, **own)
                for rate in rates
            ]
            self.stages.append(EvolvingStage(between, blocks, dims[k - 1] if k > first else None, dims[k]))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[first]))
        self.norm = BATCH_NORM[axes](dims[-1])
        self.norm_cls = nn.LayerNorm(dims[-1])
        self.head_cls = nn.Linear(dims[-1], self.num_classes) if self.num_classes else nn.Identity()
        if same is not None:
            self.set_keep_ratio(same)
        init_weights(self, conv=False)

    def set_keep_ratio(self, keep_ratio: float) -> None:
        """Set the share of the tokens that the global blocks after the first process, in (0, 1]; 1 for all tokens.

        Raises:
            ValueError: out of range.
        """
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")
        for block in [part for part in self.modules() if isinstance(part, EvolvingBlock)][1:]:
            block.keep_ratio = keep_ratio

    def forward_tokens(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the map (B, dim_i, S_i) and class token (B, 1, dim_i) of each stage; local stages yield the initial class token."""
        x = self.stem(image.contiguous(memory_format=torch.channels_last if image.ndim == 4 else torch.channels_last_3d))
        x = F.dropout(x, self.drop_rate, self.training)
        tokens: Tokens = (x, self.cls_token.expand(x.shape[0], -1, -1), None)
        for stage in self.stages:
            if isinstance(stage, EvolvingStage):
                tokens = stage(tokens, self.run_blocks)
            else:
                tokens = (stage(tokens[0], self.run_blocks), *tokens[1:])
            yield tokens[:2]

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        for x, _ in self.forward_tokens(image):
            yield x

    def forward(self, image: Tensor) -> Any:
        if not (self.training and self.num_classes):
            return super().forward(image)
        self.check_image(image)
        for x, cls in self.forward_tokens(image):  # noqa: B007 - earlier maps are freed during the loop
            pass
        return self.forward_head(self.norm(x)), self.head_cls(self.norm_cls(cls[:, 0]))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_cls = nn.Identity()
        if num_classes:
            self.head_cls = nn.Linear(self.num_features, num_classes).to(self.cls_token)
            init_head(self.head_cls)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


@family(
    "uniformer",
    name="uniformer_light",
    variants={
        "pico": dict(depths=(1, 3), dims=(32, 64), mixers="LG", head_dim=16, patch_size=2, image_size=16),
        "xxs": dict(depths=(2, 5, 8, 2), dims=(56, 112, 224, 448), head_dim=28),  # 10.2 M, 80.6 % top-1 (128: 76.8, 160: 79.1, 192: 79.9)
        "xs": dict(depths=(3, 5, 9, 3), dims=(64, 128, 256, 512), head_dim=32),  # 16.5 M, 82.0 % (192: 81.5)
    },
    official=OFFICIAL,
)
class UniFormerLight(LightModel):
    """Light UniFormer classifier: images (B, in_chans, H, W), H and W at least 29, -> logits (B, num_classes).

    In training it returns a pair of logits: those of the map and those of the class token.

    Args:
        depths, dims: blocks and channels per stage.
        mixers: "L" (local) or "G" (global) for each stage, local stages first.
        head_dim: channels per head.
        mlp_ratio: ratio of the MLPs' hidden channels to the channels, one for all stages or one per stage.
        patch_size: stride of the stem, pixels, 2 or 4.
        conv_stem: a stem of two 3 x 3 convolutions with batch norms, or a patch embedding.
        keep_ratio: share of the tokens that a global block processes (all in the first one), or a list of one share per global block, the
            first being 1; see `set_keep_ratio`.
        trade_off: weight of a global block's attention in the updated scores, one for all or one per global block.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor on the logits of the attention; None: head_dim ** -0.5.
        layer_scale: initial value of the layer scales; 0 for none.
        drop_rate: dropout after the stem, in projections and MLPs, and before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, channels that are not divisible by head_dim, other `mixers`, a keep_ratio outside (0, 1], or
            a first one below 1.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: str = "LLGG",
        head_dim: int,
        mlp_ratio: float | Sequence[float] = 3.0,
        patch_size: int = 4,
        conv_stem: bool = True,
        keep_ratio: float | Sequence[float] = 0.5,
        trade_off: float | Sequence[float] = 0.5,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        check_stages(depths, dims, mixers, head_dim)
        check_mixers(mixers)
        strides = [patch_size * 2**k for k in range(len(dims))]
        stages = [Stage(dim, stride) for dim, stride in zip(dims, strides, strict=True)]
        least = strides[-1] - patch_size + 1 if conv_stem else strides[-1]  # a stem of convolutions rounds up, patches round down
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=least)
        self.stem = Convolutions(in_chans, dims[0], 2, patch_size // 2) if conv_stem else Patches(in_chans, dims[0], patch_size)
        self.build(
            depths,
            dims,
            mixers,
            head_dim,
            axes=2,
            mlp_ratio=mlp_ratio,
            keep_ratio=keep_ratio,
            trade_off=trade_off,
            heads=dict(qkv_bias=qkv_bias, qk_scale=qk_scale),
            common=dict(layer_scale=layer_scale, drop=drop_rate),
            frames=1,
            drop_path_rate=drop_path_rate,
        )


XXS = dict(depths=(2, 5, 8, 2), dims=(56, 112, 224, 448), head_dim=28, drop_path_rate=0.0)
XS = dict(depths=(3, 5, 9, 3), dims=(64, 128, 256, 512), head_dim=32)


@family(
    "uniformer",
    name="uniformer_video_light",
    variants={  # frames; the clips are spread over the whole video; XXS at 128 or 160 pixels, XS at 192
        "pico": dict(depths=(1, 3), dims=(32, 64), mixers="LG", head_dim=16, patch_size=2, image_size=16, frames=8),
        **{f"xxs{frames}_{size}": dict(**XXS, frames=frames, image_size=size) for frames in (4, 8, 16) for size in (128, 160)},
        "xxs32_160": dict(**XXS, frames=32, image_size=160),
        "xs32_192": dict(**XS, frames=32, image_size=192),
    },
    official=OFFICIAL,
    mean=(0.45, 0.45, 0.45),
    std=(0.225, 0.225, 0.225),
    interpolation="bilinear",
)
class UniFormerVideoLight(LightModel, VideoBackbone):
    """Light video UniFormer classifier: clips (B, in_chans, T, H, W), H and W at least 29, -> logits (B, num_classes).

    In training it returns a pair of logits: those of the map and those of the class token. The stem halves the number of frames, rounded
    up. Scores compare the tokens of all frames. Image checkpoints of the same width and depth load, with kernels inflated over time.

    Args:
        depths, dims, mixers, head_dim, mlp_ratio, patch_size, keep_ratio, trade_off, qkv_bias, qk_scale: as for `UniFormerLight`.
        overlap: use kernels of three frames in the patch embeddings between stages (the authors' STD).
        layer_scale: initial value of the layer scales; 0 for none.
        drop_rate: dropout after the stem, in projections and MLPs, and before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: as for `UniFormerLight`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: str = "LLGG",
        head_dim: int,
        mlp_ratio: float | Sequence[float] = 3.0,
        patch_size: int = 4,
        keep_ratio: float | Sequence[float] = 0.5,
        trade_off: float | Sequence[float] = 0.5,
        overlap: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        check_stages(depths, dims, mixers, head_dim)
        check_mixers(mixers)
        stages = [Stage(dim, patch_size * 2**k, frame_stride=2) for k, dim in enumerate(dims)]
        least = stages[-1].stride - patch_size + 1
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, min_size=least)
        self.stem = Convolutions(in_chans, dims[0], 2, patch_size // 2, axes=3, frame_stride=2)
        self.build(
            depths,
            dims,
            mixers,
            head_dim,
            axes=3,
            mlp_ratio=mlp_ratio,
            keep_ratio=keep_ratio,
            trade_off=trade_off,
            heads=dict(qkv_bias=qkv_bias, qk_scale=qk_scale),
            common=dict(layer_scale=layer_scale, drop=drop_rate),
            frames=3 if overlap else 1,
            drop_path_rate=drop_path_rate,
        )
