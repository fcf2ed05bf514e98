"""Attention inside the windows of a map: adjacent, shifted, or dilated (grid) windows.

Legend: B batch, N tokens of the padded map, C channels, M window side, n = M * M, nW = N / n windows, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitarium.nn.attention import Attention
from vitarium.nn.positions import EvalCache, RelativePositionBias
from vitarium.ops.windows import WindowLayout

Layouts = TypeVar("Layouts")


class WindowAttention(Attention):
    """Window self-attention with a relative position bias: tokens (B, N, C) in the order of a layout -> the same shape.

    Args:
        dim: channels.
        num_heads: heads; must divide dim.
        positions: side M of a window, tokens, for a table of relative position biases; or a module that returns the biases for windows of
            side M: M -> (h, n, n).
        qkv_bias: whether the projections to queries, keys and values have a bias.
        scale: factor on the logits, head_dim ** -0.5 by default.
    """

    def __init__(self, dim: int, num_heads: int, positions: int | nn.Module, *, qkv_bias: bool = True, scale: float | None = None):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, scale=scale)
        self.position_bias: Any = RelativePositionBias(positions, num_heads) if isinstance(positions, int) else positions
        self.cache = EvalCache()

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:  # type: ignore[override]
        batch, count, dim = x.shape
        bias = self.cache.get(self, (layout, x.dtype), self.position_bias, lambda: self.bias(layout, x.dtype))
        n = bias.shape[-1]
        if bias.shape[0] > 1 and batch > 1:  # all images have the same windows
            bias = bias.expand(batch, *bias.shape).reshape(-1, *bias.shape[1:])
        return super().forward(x.view(-1, n, dim), bias).view(batch, count, dim)

    def bias(self, layout: WindowLayout, dtype: torch.dtype) -> Tensor:
        """Return the bias of the logits: (1, h, n, n), or (nW, h, n, n) if the layout masks regions inside windows."""
        bias = self.position_bias(layout.size)[None]
        if layout.region is not None:
            apart = layout.region[:, :, None] != layout.region[:, None]
            bias = bias + torch.where(apart, layout.unseen, 0.0)[:, None]
        return bias.to(dtype).contiguous()  # the fused kernel would copy it on each call


class LayoutCache:
    """Cache of the layouts of the most recent map sizes. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, torch.device], Any] = {}

    def get(self, height: int, width: int, device: torch.device, build: Callable[[], Layouts]) -> Layouts:
        """Return the layouts of a map of height x width, computed by `build` if they are not cached."""
        if torch.compiler.is_compiling():
            return build()
        key = (height, width, device)
        if key not in self._kept:
            with torch.inference_mode(False):  # a later training step cannot use inference tensors
                built = build()
            self._kept = {**dict(list(self._kept.items())[-15:]), key: built}
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}
