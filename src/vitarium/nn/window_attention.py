"""Attention inside windows of a map, whatever the windows are: side by side, moved, or spread over the map as a grid.

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
    """Self-attention inside windows with a relative position bias: (B, N, C) in the order of a layout -> the same.

    Args:
        dim: channels.
        num_heads: heads; dim must divide by it.
        positions: side M of a window, tokens, for a table of relative position biases; or a module that gives the biases of windows of
            side M: M -> (h, n, n).
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, dim: int, num_heads: int, positions: int | nn.Module, *, qkv_bias: bool = True):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias)
        self.position_bias: Any = RelativePositionBias(positions, num_heads) if isinstance(positions, int) else positions
        self.cache = EvalCache()

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:  # type: ignore[override]
        batch, count, dim = x.shape
        bias = self.cache.get(self, (layout, x.dtype), self.position_bias, lambda: self.bias(layout, x.dtype))
        n = bias.shape[-1]
        if bias.shape[0] > 1 and batch > 1:  # each image has the same windows
            bias = bias.expand(batch, *bias.shape).reshape(-1, *bias.shape[1:])
        return super().forward(x.view(-1, n, dim), bias).view(batch, count, dim)

    def bias(self, layout: WindowLayout, dtype: torch.dtype) -> Tensor:
        """What is added to the logits: (1, h, n, n), or (nW, h, n, n) where a layout keeps regions of a window apart."""
        bias = self.position_bias(layout.size)[None]
        if layout.region is not None:
            apart = layout.region[:, :, None] != layout.region[:, None]
            bias = bias + torch.where(apart, layout.unseen, 0.0)[:, None]
        return bias.to(dtype).contiguous()  # the fused kernel would copy it at each call


class LayoutCache:
    """Keeps the layouts of the map sizes that were seen last. A copy or a pickle of it starts empty."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, torch.device], Any] = {}

    def get(self, height: int, width: int, device: torch.device, build: Callable[[], Layouts]) -> Layouts:
        """The layout or layouts of a map; `build` makes them where they are not there yet."""
        if torch.compiler.is_compiling():
            return build()
        key = (height, width, device)
        if key not in self._kept:
            with torch.inference_mode(False):  # an inference tensor would be refused by a later training step
                built = build()
            self._kept = {**dict(list(self._kept.items())[-15:]), key: built}
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}
