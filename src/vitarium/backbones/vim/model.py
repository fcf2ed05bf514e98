"""Vim: the sequence of patches and class tokens, the authors' names, the variants, and the classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.backbones.vim.mixer import DIRECTIONS, NORMS, VimBlock, VimMixer
from vitarium.catalog import family, rename
from vitarium.nn import (
    EvalCache,
    PatchEmbed,
    TokenBackbone,
    apply_rotary,
    drop_path_rates,
    resize_position_table,
    rotary_2d,
)
from vitarium.nn.backbone import init_head
from vitarium.ops.maps import as_tokens
from vitarium.ops.scan import IMPLEMENTATIONS

PLACES = ("middle", "first", "ends", "none")
ROTARY = ("none", "branches", "stream")
SPAN = 14
"""Rows and columns that the rotary positions of every grid are scaled to."""


def class_places(place: str, patches: int) -> list[int]:
    """Return the positions of the class tokens in the sequence of an image with this number of patches, ascending."""
    return {"middle": [patches // 2], "first": [0], "ends": [0, patches + 1], "none": []}[place]


def insert_tokens(patches: Tensor, tokens: Tensor | None, places: Sequence[int]) -> Tensor:
    """Insert tokens (B, P, C) into a sequence of patches (B, M, C) at the given positions of the result, (B, P + M, C)."""
    if tokens is None:
        return patches
    parts, start = [], 0
    for i, place in enumerate(places):
        parts += [patches[:, start : place - i], tokens[:, i : i + 1]]
        start = place - i
    return torch.cat([*parts, patches[:, start:]], 1)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], place: str, *, as_authors: bool = False) -> Tensor:
    """Resize a position table to another grid: (1, P + h w, C) -> (1, P + h' w', C), P the number of class tokens of `place`.

    Args:
        table: rows in the order of the sequence, including that of the class token.
        old, new: rows and columns of the grids.
        place: position of the class token, one of PLACES.
        as_authors: resize as the authors' fine-tuning code, which always treats the first rows as those of the class tokens. Their "+"
            models were initialised this way; their own tables need no resizing.
    """
    before, after = (class_places(place, grid[0] * grid[1]) for grid in (old, new))
    if as_authors:
        before = after = list(range(len(before)))
    others = [i for i in range(table.shape[1]) if i not in before]
    patches = resize_position_table(table[:, others], old, new)
    return insert_tokens(patches, table[:, before] if before else None, after)


def rotary_table(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the rotary table of the patches of a grid, (2, h w, dim)."""
    return rotary_2d(dim, *grid, span=SPAN)


def _direction(number: int, suffix: str) -> list[tuple[str, str]]:
    """Return the renaming rules of one direction; the authors' names of the backward direction contain "_b"."""
    inside = rf"blocks.\1.mixer.directions.{number}"
    layers = [(rf"^layers\.(\d+)\.mixer\.{name}{suffix}\.", rf"{inside}.{name}.") for name in ("conv1d", "x_proj", "dt_proj")]
    return [
        *layers,
        (rf"^layers\.(\d+)\.mixer\.A{suffix}_log$", rf"{inside}.A_log"),
        (rf"^layers\.(\d+)\.mixer\.D{suffix}$", rf"{inside}.D"),
    ]


_REST = [(r"^layers\.", "blocks."), (r"^norm_f\.", "norm.")]
_SEPARATE = rename(*_direction(0, ""), *_direction(1, "_b"), *_REST)
_SHARED = rename(*_direction(0, ""), (r"^layers\.(\d+)\.mixer\.A_b_log$", r"blocks.\1.mixer.directions.0.A_b_log"), *_REST)


def OFFICIAL(state: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: N802 - a renamer like those of other systems
    """Convert the authors' names; directions with shared weights are recognised by their single convolution."""
    state = dict(state)
    for new, axis, parts in (("cls_token", 1, ("cls_token_head", "cls_token_tail")), ("rotary", 0, ("rope.freqs_cos", "rope.freqs_sin"))):
        if all(part in state for part in parts):
            found = [state.pop(part) for part in parts]
            state[new] = torch.cat(found, axis) if axis else torch.stack(found)
    shared = any(name.endswith(".A_b_log") for name in state) and not any(".conv1d_b." in name for name in state)
    return (_SHARED if shared else _SEPARATE)(state)


FIRST_RELEASE: dict[str, Any] = dict(class_token="first", rotary="stream", average=False)


@family(
    "vim",
    variants={
        "pico": dict(embed_dim=48, depth=3, patch_size=4, d_state=8, image_size=16),
        "tiny_rope": dict(embed_dim=192, depth=24, **FIRST_RELEASE),  # 73.1 %
        "tiny": dict(embed_dim=192, depth=24),  # 7.1 M, 76.1 % top-1
        "tiny_plus": dict(embed_dim=192, depth=24, stride=8),  # fine-tuned with overlapping patches, 78.3 %
        "small": dict(embed_dim=384, depth=24, drop_path_rate=0.05),  # 25.8 M, 80.5 %
        "small_plus": dict(embed_dim=384, depth=24, stride=8, drop_path_rate=0.05),  # 81.6 %
        "base": dict(embed_dim=768, depth=24),  # 97.6 M, 81.9 %
    },
    official=OFFICIAL,
    weights={
        "tiny": {"in1k": ("hf:hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth",)},
        "tiny_rope": {"in1k": ("hf:hustvl/Vim-tiny/vim_tiny_73p1.pth",)},
        "tiny_plus": {"in1k": ("hf:hustvl/Vim-tiny-midclstok/vim_t_midclstok_ft_78p3acc.pth",)},
        "small": {"in1k": ("hf:hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth",)},
        "small_plus": {"in1k": ("hf:hustvl/Vim-small-midclstok/vim_s_midclstok_ft_81p6acc.pth",)},
        "base": {"in1k": ("hf:hustvl/Vim-base-midclstok/vim_b_midclstok_81p9acc.pth",)},
    },
)
class Vim(TokenBackbone):
    """Vision Mamba classifier: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    Args:
        embed_dim: channels C.
        depth: blocks.
        patch_size: side of a patch, pixels.
        stride: pixels between patches; None for patch_size.
        image_size: side, in pixels, of the square image that the position table is made for.
        d_state, d_conv, expand: states N per channel, kernel size of the convolutions, ratio of inner channels to channels.
        directions: "forward" or "backward" for each scan of a block: both (the authors' "v2"), or one of them ("none").
        shared: scans in both directions that share all weights but the decay rates, in place of `directions` ("v1").
        average: average the outputs of the directions, or add them.
        alternate: run the blocks in pairs, the second on the reversed sequence, and average the two; needs an even depth.
        class_token: position of the class token, "middle" (before patch M // 2 of M) or "first", one at both "ends" (averaged), or "none"
            for pooling the patches.
        global_pool: image feature: "token", "avg", "max" or "last" (the last token); "max_logits" is the maximum of the tokens' logits.
            None: "token" with a class token, else "avg".
        positions: whether to add a learned position table.
        rotary: also rotate channels by their token's row and column before each block: of the whole "stream", of the output of the previous
            block ("branches"), or "none". As in the authors' code, the table starts at the second token if there is one class token.
        norm: "rms" or "layer".
        layer_scale_init_value: initial value of factors on the output of each mixer; 0 for none.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.
        scan: implementation of the scan: "loop", "numba", "triton", or "auto" for the fastest of them on the device.

    Raises:
        ValueError: another class_token, global_pool, direction, rotary, norm or scan, or an odd depth with `alternate`.
    """

    pools = (*TokenBackbone.pools, "last", "max_logits")
    rotary: Tensor | None

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        patch_size: int = 16,
        stride: int | None = None,
        image_size: int = 224,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        directions: Sequence[str] = DIRECTIONS,
        shared: bool = False,
        average: bool = True,
        alternate: bool = False,
        class_token: str = "middle",
        global_pool: str | None = None,
        positions: bool = True,
        rotary: str = "none",
        norm: str = "rms",
        layer_scale_init_value: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        scan: str = "auto",
    ):
        for option, value, accepted in (
            ("class_token", class_token, PLACES),
            ("rotary", rotary, ROTARY),
            ("norm", norm, NORMS),
            ("scan", scan, IMPLEMENTATIONS),
        ):
            _check_choice(option, value, tuple(accepted))
        if alternate and depth % 2:
            raise ValueError(f"alternate needs an even depth, got {depth}")
        for direction in directions or [""]:
            _check_choice("each of directions", direction, DIRECTIONS)
        super().__init__(
            dim=embed_dim, depth=depth, stride=stride or patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
        )
        self.place, self.alternate, self.rotates = class_token, alternate, rotary
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, stride=stride)
        self.table_grid = self.patch_embed.grid(image_size, image_size)
        own, count = len(self.class_places(0)), self.table_grid[0] * self.table_grid[1]
        self.cls_token = nn.Parameter(torch.empty(1, own, embed_dim)) if own else None
        self.pos_embed = nn.Parameter(torch.empty(1, count + own, embed_dim)) if positions else None
        self.register_buffer("rotary", None if rotary == "none" else rotary_table(embed_dim, self.table_grid))
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        mixer = dict(d_state=d_state, d_conv=d_conv, expand=expand, directions=directions, shared=shared, average=average, scan=scan)
        self.blocks = nn.ModuleList(VimBlock(embed_dim, rate, norm, layer_scale=layer_scale_init_value, **mixer) for rate in rates)
        self.norm = NORMS[norm](embed_dim, eps=1e-5)
        self.pools = self.pools if own else tuple(pool for pool in self.pools if pool != "token")
        self.global_pool = self.pools[0] if global_pool is None else global_pool
        _check_choice("global_pool", self.global_pool, self.pools)
        self._init_weights(depth)

    def _init_weights(self, depth: int) -> None:
        for part in self.modules():
            if isinstance(part, VimMixer):
                with torch.no_grad():
                    part.out_proj.weight.div_(math.sqrt(depth))
        conv = self.patch_embed.proj
        nn.init.trunc_normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        if isinstance(self.head, nn.Linear):
            init_head(self.head)

    def class_places(self, patches: int) -> list[int]:
        return class_places(self.place, patches)

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the position table of a grid, (1, L, C), resampled unless the model was made for this grid; None if it has none."""
        table = self.pos_embed
        if table is None or grid == self.table_grid:
            return table
        return self.cache.get(self, grid, table, lambda: resize_positions(table, self.table_grid, grid, self.place))

    def rotary_of(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the rotary table of the sequence of a grid, (2, L, C), the identity for class tokens; None if it has none."""
        table = self.rotary
        if table is None:
            return None
        table = table if grid == self.table_grid else rotary_table(table.shape[2], grid).to(table)
        own = len(self.class_places(0))
        still = torch.stack([table.new_ones(own, table.shape[2]), table.new_zeros(own, table.shape[2])])
        return insert_tokens(table, still, [0] if own == 1 else self.class_places(grid[0] * grid[1]))

    def embed(self, image: Tensor) -> Tensor:
        """Return the initial tokens of images, (B, L, C), at least float32."""
        x = as_tokens(self.patch_embed(image))
        first = None if self.cls_token is None else self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
        x = insert_tokens(x, first, self.class_places(x.shape[1]))
        table = self.positions(self.patch_embed.grid(*image.shape[-2:]))
        x = x if table is None else x + table
        return x if x.dtype is torch.float64 else x.float()

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block, (B, L, C), at least float32: the residual stream is not rounded to half precision."""
        x, table = self.embed(image), self.rotary_of(self.patch_embed.grid(*image.shape[-2:]))
        step, last = 2 if self.alternate else 1, len(self.blocks) - 1
        for i in range(0, len(self.blocks), step):
            if table is not None and (i == 0 or self.rotates == "stream"):
                x = apply_rotary(x, table)
            # the output of a block is rotated before the next one, hence not in the last
            after = table if self.rotates == "branches" and i + step <= last else None
            y = self.run_blocks([self.blocks[i]], x, after)
            yield y
            if self.alternate and i < last:
                back = self.run_blocks([self.blocks[i + 1]], x.flip(1), None if after is None else after.flip(1))
                y = (y + back.flip(1)) / 2
                yield y
            x = y

    def pool(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens (B, L, C) by `global_pool`: (B, C). "max_logits" has no pooled feature; the mean stands for it."""
        if self.global_pool == "last":
            return features[:, -1]
        return self.split_tokens(features)[1].mean(1) if self.global_pool == "max_logits" else super().pool(features, mask)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool != "max_logits" or pre_logits or not self.num_classes:
            return super().forward_head(features, pre_logits)
        return self.head(F.dropout(features, self.drop_rate, self.training)).amax(1)

    @torch.no_grad()
    def hidden_attention(self, image: Tensor, block: int = -1) -> Tensor:
        """Return the implicit attention from the class token to the patches in the scans of a block, for visualisation.

        Args:
            image: (B, in_chans, H, W).
            block: index of the block; negative indices count from the last.

        Returns:
            (B, h, w), non-negative; for a model without class token, the mean over all patches.
        """
        self.check_image(image)
        number = self.take_indices([block])[0]
        inputs: list[Tensor] = []
        chosen: Any = self.blocks[number].mixer
        handle = chosen.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            self.forward_intermediates(image, [number], stop_early=True, intermediates_only=True)
        finally:
            handle.remove()
        taken = chosen.attention(inputs[0])
        taken = taken.flip(1, 2) if self.alternate and number % 2 else taken
        places = self.class_places(taken.shape[1] - len(self.class_places(0)))
        row = taken[:, places].mean(1) if places else taken.mean(1)
        return self.as_map(row[..., None], image.shape[-2:])[:, 0]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in ("pos_embed", "cls_token") or name.endswith(("A_log", "A_b_log"))}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        if name == "rotary" and tensor.shape[::2] == shape[::2]:
            return rotary_table(shape[2], self.table_grid).to(tensor.dtype)
        extra = len(self.class_places(0))
        side = math.isqrt(max(0, tensor.shape[1] - extra)) if tensor.ndim == 3 else 0
        if name != "pos_embed" or tensor.shape[2:] != shape[2:] or side**2 + extra != tensor.shape[1]:
            return None
        return resize_positions(tensor, (side, side), self.table_grid, self.place)


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
