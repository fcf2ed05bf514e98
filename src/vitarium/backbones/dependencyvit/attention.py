"""Reversed attention and its message controller.

Legend: as in the package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitarium.nn import Linear
from vitarium.ops.attention import merge_heads, split_packed_heads
from vitarium.ops.reversed_product import reversed_product

TEMPERATURE = 0.1
"""Temperature of the head selector (the paper's appendix D.1)."""


class MessageController(nn.Module):
    """Scale of the messages of each token: (B, N, dim) -> (B, N) in (0, 1), at least float32."""

    def __init__(self, dim: int, bias: float):
        super().__init__()
        self.bias = bias
        self.fc1 = Linear(dim, dim // 2, bias=False)
        self.act = nn.GELU()
        self.fc2 = Linear(dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (precise(self.fc2(self.act(self.fc1(x)))[..., 0]) + self.bias).sigmoid()


class ReversedAttention(nn.Module):
    """Reversed self-attention, in which tokens send messages: (B, N, dim) -> (B, N, dim).

    It can take the `qkv` and `proj` of a ViT's attention; the softmax runs over the receiving tokens.

    Args:
        dim, num_heads: channels and heads.
        qkv_bias: as for `vitarium.nn.Attention`.
        qk_norm: norm class for the queries and keys of each head, or None.
        message_bias: bias b of the message controller.

    Raises:
        ValueError: dim is not divisible by num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = False, qk_norm: type[nn.Module] | None = None, message_bias: float = 4.0
    ):
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.head_selector = Linear(dim, num_heads, bias=False)
        self.message_controller = MessageController(dim, message_bias)

    def forward(self, x: Tensor, messages: Tensor, count: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Send messages between the tokens.

        Args:
            x: tokens, (B, N, dim).
            messages: m of the previous layer, (B, N).
            count: also return the mass that each token receives.

        Returns:
            tokens (B, N, dim), m (B, N), and the received mass, summed over heads and children (B, N), or None.
        """
        q, k, v, weight, messages = self._parts(x, messages)
        weight = weight.to(v.dtype)[..., None]
        sent = torch.cat([v * weight, weight], -1) if count else v * weight
        received = reversed_product(q, k, sent)
        mass = received[..., -1].sum(1) if count else None
        return self.proj(merge_heads(received[..., : self.head_dim])), messages, mass

    def dependency_mask(self, x: Tensor, messages: Tensor) -> Tensor:
        """Return the dependency mask A, (B, N, N) as [parent, child], for trees and visualisation. Arguments as in `forward`."""
        q, k, _, weight, _ = self._parts(x, messages)
        forward = precise(q @ k.transpose(-2, -1)).softmax(-1)
        return (forward * weight[..., None]).sum(1).transpose(1, 2)

    def _parts(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return scaled queries, keys and values (B, H, N, d), p m (B, H, N) and m (B, N)."""
        q, k, v = split_packed_heads(self.qkv(x), 3, self.num_heads)
        messages = messages * self.message_controller(x)
        heads = (precise(self.head_selector(x)) / TEMPERATURE).softmax(-1)
        weight = (heads * messages[..., None]).transpose(1, 2)
        return self.q_norm(q) * self.head_dim**-0.5, self.k_norm(k), v, weight, messages


def precise(x: Tensor) -> Tensor:
    """Convert to at least float32: products of many gates leave the range of half precision."""
    return x if x.dtype is torch.float64 else x.float()
