"""Basic layers: stochastic depth, layer scale, channels-first layer norm, MLP, squeeze-and-excitation, initialisation.

timm has equivalents; these exist because importing timm takes longer than importing torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.ops.linear import Gelu, in_plain_inference, linear

PIECE_BYTES = 2**23
"""Size of the hidden tensor of an MLP that is computed at once, bytes; it fits the last-level cache."""


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of a sample with probability `drop_prob` and scale the others by 1 / (1 - drop_prob).

    Any shape (B, ...). The identity in evaluation mode. Source: Huang et al. 2016, per sample as in timm.

    Raises:
        ValueError: drop_prob outside [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0):
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob must lie in [0, 1), got {drop_prob}")
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * kept.div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return drop path rates that rise linearly from 0 at the first block to `rate` at the last, one list per stage of `depths` blocks."""
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu", dtype=torch.float64).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


class LayerScale(nn.Module):
    """Learned factor per channel of a residual branch, (..., C) -> (..., C). Source: CaiT (Touvron et al. 2021)."""

    def __init__(self, dim: int, init_value: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def layer_scale_gamma(dim: int, init_value: float) -> nn.Parameter | None:
    """Return the factors of a layer scale, (dim,) floating-point, for blocks that hold them themselves; None if init_value is 0.

    Raises:
        ValueError: a negative init_value.
    """
    if init_value < 0:
        raise ValueError(f"the initial value of a layer scale must be at least 0 (0: none), got {init_value}")
    return nn.Parameter(torch.full((dim,), float(init_value))) if init_value > 0 else None


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map, (B, C, H, W) -> (B, C, H, W).

    Computed on a channels-last view; a map with channels-last memory is not copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm3d(nn.LayerNorm):
    """Layer norm over the channels of a video map, (B, C, T, H, W) -> (B, C, T, H, W). See `LayerNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Linear(nn.Linear):
    """nn.Linear that calls the fastest kernel of the device (see `vitarium.ops.linear`): (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class QuickGELU(nn.Module):
    """Approximate GELU x sigmoid(1.702 x), the activation of CLIP and CvT."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Multi-layer perceptron with one hidden layer and dropout after each linear layer: (..., dim) -> (..., dim).

    In inference on a CPU the tokens are processed in pieces whose hidden tensor fits the cache: a full-batch buffer would be reallocated on
    every call, which costs more than the arithmetic on it.

    Args:
        dim: input and output channels.
        hidden_dim: hidden channels.
        act_layer: class of the activation; exact GELU by default.
        drop: dropout rate after each linear layer.
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: type[nn.Module] = nn.GELU, *, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = Linear(hidden_dim, dim)
        self.drop_rate = drop

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not self.training and self._untouched() and in_plain_inference(x, self.fc1.weight):
            return self._in_pieces(x)
        x = F.dropout(self.act(self.fc1(x)), self.drop_rate, self.training)
        return F.dropout(self.fc2(x), self.drop_rate, self.training)

    def _in_pieces(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        most = max(1, PIECE_BYTES // (self.fc1.out_features * x.element_size()))
        if len(tokens) <= most:
            return self.fc2(self._hidden(x))
        out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        for piece, result in zip(tokens.split(most), out.split(most), strict=True):
            result.copy_(self.fc2(self._hidden(piece)))
        return out.view(x.shape)

    def _hidden(self, x: Tensor) -> Tensor:
        """Apply the first layer and the activation; a GELU runs in the same kernel."""
        if type(self.act) is nn.GELU:
            return linear(x, self.fc1.weight, self.fc1.bias, gelu=cast(Gelu, self.act.approximate))
        return self.act(self.fc1(x))

    def _untouched(self) -> bool:
        """Return whether the layers are the original ones without hooks; a quantizer or an explainer must see all tokens at once."""
        parts = (self.fc1, self.act, self.fc2)
        return type(self.fc1) is type(self.fc2) is Linear and not any(p._forward_hooks or p._forward_pre_hooks for p in parts)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scale the channels by a gate computed from their means, (B, C, H, W) -> the same shape."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


def init_weights(module: nn.Module, *, std: float = 0.02, conv: bool = True) -> None:
    """Initialise every linear (and, with `conv`, convolution) layer below `module` in place: truncated normal weights, zero biases."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if conv else (nn.Linear,)
    for part in module.modules():
        if isinstance(part, kinds):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def init_convs_by_fan_out(module: nn.Module, *, pointwise: bool = True) -> None:
    """Initialise every 2-D convolution below `module` in place: normal weights of variance 2 / (k^2 C_out / groups), zero biases.

    Args:
        pointwise: also initialise 1 x 1 convolutions.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and (pointwise or part.kernel_size != (1, 1)):
            nn.init.normal_(part.weight, std=math.sqrt(2 / (part.kernel_size[0] * part.kernel_size[1] * part.out_channels / part.groups)))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
