"""Vision Mamba (Vim): a plain backbone with bidirectional selective scans in place of attention (Zhu et al., "Vision Mamba", 2024).

The idea: the architecture of a ViT (patches, class token, learned positions, equal blocks) with *selective scans* in place of attention and
MLP: each channel carries a state of N values along the sequence, with input-dependent writing, reading and decay. A scan is causal, so each
block has two, one in each direction, and the class token is placed in the middle of the sequence.

    x <- x + W_out(mean over directions of y . SiLU(z))            with [u | z] = W_in RMSNorm(x)
    v = SiLU(causal depth-wise conv_4(u));  [dt | b | c] = W_x v;  delta = softplus(W_dt dt + bias)
    s_t = exp(delta_t A) s_{t-1} + delta_t b_t v_t;  y_t = <c_t, s_t> + D v_t

Follows the authors' code (github hustvl/Vim, its released "bimamba v2, middle class token, divide by 2" models); its checkpoints load by
name. Options that no released model uses are left out (rotary positions, directions alternating by layer, weights shared between
directions). Any image size: positions are resampled and incomplete patches are padded with zeros (the authors' code refuses other sizes).
Cost: linear in tokens, in time and in memory.

Speed: the memory layout is (batch, tokens, channels) throughout; the backward direction runs its convolution and its scan from the end
instead of flipping tensors; the two directions share one gating, since a flip of y and z commutes with their product; the scan is a
compiled kernel.

Legend: B images, L tokens, C = embed_dim, E = 2 C inner channels, N states per channel, R rank of the step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family, rename
from vitarium.nn import DropPath, EvalCache, Linear, PatchEmbed, TokenBackbone, drop_path_rates, resize_position_table
from vitarium.nn.backbone import init_head
from vitarium.ops.linear import linear
from vitarium.ops.maps import as_tokens
from vitarium.ops.scan import IMPLEMENTATIONS, causal_conv_silu, scan_matrix, selective_scan

DIRECTIONS = ("forward", "backward")
PLACES = ("middle", "first", "none")


class ScanDirection(nn.Module):
    """Convolution and selective scan in one direction, with separate weights: (B, L, E) -> (B, L, E).

    Args:
        dim: inner channels E.
        d_state: states N per channel.
        dt_rank: rank R of the step sizes.
        d_conv: kernel size of the convolution.
        direction: "forward" or "backward".
        scan: implementation, as for `vitarium.ops.scan.selective_scan`.
    """

    def __init__(self, dim: int, d_state: int, dt_rank: int, d_conv: int, direction: str, scan: str):
        super().__init__()
        self.reverse = direction == "backward"
        self.scan = scan
        self.sizes = [dt_rank, d_state, d_state]
        self.cache = EvalCache()
        self.conv1d = nn.Conv1d(dim, dim, d_conv, groups=dim)
        self.x_proj = Linear(dim, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, dim)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        step = torch.exp(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, u: Tensor) -> Tensor:
        assert self.conv1d.bias is not None
        v = causal_conv_silu(u, self.conv1d.weight[:, 0], self.conv1d.bias, reverse=self.reverse)
        dt, b, c = self.x_proj(v).split(self.sizes, -1)
        delta = linear(dt, self.dt_proj.weight)
        rate = self.cache.get(self, "rate", self.A_log, self.rate)
        bias = self.dt_proj.bias
        y, _ = selective_scan(v, delta, rate, b, c, self.D, bias=bias, softplus=True, reverse=self.reverse, implementation=self.scan)
        return y

    def attention(self, u: Tensor) -> Tensor:
        """Return the absolute weights of the scan as a matrix, averaged over channels: u (B, L, E) -> (B, L, L); quadratic in L."""
        assert self.conv1d.bias is not None
        v = causal_conv_silu(u, self.conv1d.weight[:, 0], self.conv1d.bias, reverse=self.reverse)
        dt, b, c = self.x_proj(v).split(self.sizes, -1)
        delta = F.softplus(self.dt_proj(dt))
        if self.reverse:
            delta, b, c = (part.flip(1) for part in (delta, b, c))
        rate, parts = self.rate(), range(0, delta.shape[2], 32)  # a few channels at a time, to limit the memory of their matrices
        total = sum(scan_matrix(delta[..., i : i + 32], rate[i : i + 32], b, c).abs().sum(1) for i in parts) / delta.shape[2]
        assert isinstance(total, Tensor)
        return total.flip(1, 2) if self.reverse else total

    def rate(self) -> Tensor:
        """Return the decay rates A, (E, N), in at least float32."""
        exact = torch.float64 if self.A_log.dtype is torch.float64 else torch.float32
        return -torch.exp(self.A_log.to(exact))

    def extra_repr(self) -> str:
        return f"direction={'backward' if self.reverse else 'forward'}, scan={self.scan}"


class VimMixer(nn.Module):
    """Mamba token mixer with scans along the sequence, a replacement for attention: (B, L, dim) -> (B, L, dim).

    Args:
        dim: channels.
        d_state, d_conv: states per channel, kernel size of the convolution.
        expand: ratio of inner channels to channels.
        directions: "forward" or "backward" for each scan; scans have separate weights, their outputs are averaged.
        scan: implementation, as for `vitarium.ops.scan.selective_scan`.
    """

    def __init__(self, dim: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2, directions: Sequence[str] = DIRECTIONS, scan: str = "auto"):  # fmt: skip # noqa: E501
        super().__init__()
        inner = expand * dim
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.directions = nn.ModuleList(ScanDirection(inner, d_state, math.ceil(dim / 16), d_conv, name, scan) for name in directions)
        self.out_proj = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        first, *others = (scan(u) for scan in self.directions)
        for y in others:
            first = first + y
        return self.out_proj(first * F.silu(z)) / len(self.directions)

    def attention(self, x: Tensor) -> Tensor:
        """Return the implicit attention of tokens (B, L, dim), averaged over directions: (B, L, L), row = output, column = input."""
        u, _ = self.in_proj(x).chunk(2, -1)
        return torch.stack([scan.attention(u) for scan in self.directions]).mean(0)  # type: ignore[operator]


class RMSNorm(nn.RMSNorm):
    """RMS norm computed in the precision of x and returned in that of the weight, since the residual stream may be more precise."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class VimBlock(nn.Module):
    """Pre-norm residual block with a `VimMixer`: (B, L, C) -> the same shape."""

    def __init__(self, dim: int, d_state: int, drop_path: float, directions: Sequence[str], scan: str):
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5)
        self.mixer = VimMixer(dim, d_state=d_state, directions=directions, scan=scan)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], place: str, *, as_authors: bool = False) -> Tensor:
    """Resize a position table to another grid: (1, P + h w, C) -> (1, P + h' w', C), P = 0 if `place` is "none", else 1.

    Args:
        table: rows in the order of the sequence, including that of the class token.
        old, new: rows and columns of the grids.
        place: position of the class token, one of PLACES.
        as_authors: resize as the authors' fine-tuning code, which always treats the first row as that of the class token. Their "+" models
            were initialised this way; their own tables need no resizing.
    """
    if place == "none":
        return resize_position_table(table, old, new)
    before, after = (0 if place == "first" or as_authors else grid[0] * grid[1] // 2 for grid in (old, new))
    own, patches = table[:, before : before + 1], torch.cat([table[:, :before], table[:, before + 1 :]], 1)
    patches = resize_position_table(patches, old, new)
    return torch.cat([patches[:, :after], own, patches[:, after:]], 1)


def _direction(number: int, suffix: str) -> list[tuple[str, str]]:
    """Return the renaming rules of one direction; the authors' names of the backward direction contain "_b"."""
    inside = rf"layers.\1.mixer.directions.{number}".replace("layers", "blocks")
    layers = [(rf"^layers\.(\d+)\.mixer\.{name}{suffix}\.", rf"{inside}.{name}.") for name in ("conv1d", "x_proj", "dt_proj")]
    return [
        *layers,
        (rf"^layers\.(\d+)\.mixer\.A{suffix}_log$", rf"{inside}.A_log"),
        (rf"^layers\.(\d+)\.mixer\.D{suffix}$", rf"{inside}.D"),
    ]


OFFICIAL = rename(*_direction(0, ""), *_direction(1, "_b"), (r"^layers\.", "blocks."), (r"^norm_f\.", "norm."))


@family(
    "vim",
    variants={
        "pico": dict(embed_dim=48, depth=3, patch_size=4, d_state=8, image_size=16),
        "tiny": dict(embed_dim=192, depth=24),  # 7.1 M, 76.1 % top-1
        "tiny_plus": dict(embed_dim=192, depth=24, stride=8),  # fine-tuned with overlapping patches, 78.3 %
        "small": dict(embed_dim=384, depth=24, drop_path_rate=0.05),  # 25.8 M, 80.5 %
        "small_plus": dict(embed_dim=384, depth=24, stride=8, drop_path_rate=0.05),  # 81.6 %
        "base": dict(embed_dim=768, depth=24),  # 97.6 M, 81.9 %
    },
    official=OFFICIAL,
    weights={
        "tiny": {"in1k": ("hf:hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth",)},
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
        d_state: states N per channel.
        directions: "forward" or "backward" for each scan of a block.
        class_token: position of the class token, "middle" (before patch M // 2 of M) or "first", or "none" for pooling the patches.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.
        scan: implementation of the scan: "loop", "numba", "triton", or "auto" for the fastest of them on the device.

    Raises:
        ValueError: another class_token, direction or scan.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        patch_size: int = 16,
        stride: int | None = None,
        image_size: int = 224,
        d_state: int = 16,
        directions: Sequence[str] = DIRECTIONS,
        class_token: str = "middle",
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        scan: str = "auto",
    ):
        _check_choice("class_token", class_token, PLACES)
        _check_choice("scan", scan, IMPLEMENTATIONS)
        for direction in directions or [""]:
            _check_choice("each of directions", direction, DIRECTIONS)
        super().__init__(
            dim=embed_dim, depth=depth, stride=stride or patch_size, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
        )
        self.place = class_token
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, stride=stride)
        self.table_grid = self.patch_embed.grid(image_size, image_size)
        count = self.table_grid[0] * self.table_grid[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token != "none" else None
        self.pos_embed = nn.Parameter(torch.empty(1, count + (class_token != "none"), embed_dim))
        self.cache = EvalCache()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(VimBlock(embed_dim, d_state, rate, directions, scan) for rate in rates)
        self.norm = RMSNorm(embed_dim, eps=1e-5)
        if class_token == "none":
            self.pools, self.global_pool = self.pools[1:], "avg"
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
        return {"middle": [patches // 2], "first": [0], "none": []}[self.place]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table of a grid, (1, L, C), resampled unless the model was made for this grid."""
        if grid == self.table_grid:
            return self.pos_embed
        return self.cache.get(self, grid, self.pos_embed, lambda: resize_positions(self.pos_embed, self.table_grid, grid, self.place))

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block, (B, L, C), at least float32: the residual stream is not rounded to half precision."""
        x = as_tokens(self.patch_embed(image))
        if self.cls_token is not None:
            middle = self.class_places(x.shape[1])[0]
            x = torch.cat([x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x[:, middle:]], 1)
        x = x + self.positions(self.patch_embed.grid(*image.shape[-2:]))
        x = x if x.dtype is torch.float64 else x.float()
        for block in self.blocks:
            x = self.run_blocks([block], x)
            yield x

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
        places = self.class_places(taken.shape[1] - (self.place != "none"))
        row = taken[:, places].mean(1) if places else taken.mean(1)
        return self.as_map(row[..., None], image.shape[-2:])[:, 0]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in ("pos_embed", "cls_token") or name.endswith(".A_log")}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Resize a position table of a checkpoint to the grid of this model; return None for any other tensor."""
        extra = self.place != "none"
        side = math.isqrt(max(0, tensor.shape[1] - extra)) if tensor.ndim == 3 else 0
        if name != "pos_embed" or tensor.shape[2:] != shape[2:] or side**2 + extra != tensor.shape[1]:
            return None
        return resize_positions(tensor, (side, side), self.table_grid, self.place)


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
