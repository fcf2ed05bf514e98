"""Attention in which tokens send, and who sends how much.

Legend: as in the package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitarium.nn import Linear
from vitarium.ops.attention import merge_heads, split_packed_heads
from vitarium.ops.reversed_product import reversed_product

TEMPERATURE = 0.1
"""Of the head selector (the paper's appendix D.1)."""


class MessageController(nn.Module):
    """Whether a token sends: (B, N, dim) -> (B, N) in (0, 1), single precision at least."""

    def __init__(self, dim: int, bias: float):
        super().__init__()
        self.bias = bias
        self.fc1 = Linear(dim, dim // 2, bias=False)
        self.act = nn.GELU()
        self.fc2 = Linear(dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (precise(self.fc2(self.act(self.fc1(x)))[..., 0]) + self.bias).sigmoid()


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
        return self.proj(merge_heads(received[..., : self.head_dim])), messages, mass

    def dependency_mask(self, x: Tensor, messages: Tensor) -> Tensor:
        """A, (B, N, N) as [parent, child], written out: for trees, pictures and measurements. Arguments as in `forward`."""
        q, k, _, weight, _ = self._parts(x, messages)
        forward = precise(q @ k.transpose(-2, -1)).softmax(-1)
        return (forward * weight[..., None]).sum(1).transpose(1, 2)

    def _parts(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries, keys, values (B, H, N, d), p m (B, H, N) and m (B, N)."""
        q, k, v = split_packed_heads(self.qkv(x), 3, self.num_heads)
        messages = messages * self.message_controller(x)
        heads = (precise(self.head_selector(x)) / TEMPERATURE).softmax(-1)
        weight = (heads * messages[..., None]).transpose(1, 2)
        return self.q_norm(q) * self.head_dim**-0.5, self.k_norm(k), v, weight, messages


def precise(x: Tensor) -> Tensor:
    """At least single precision: products of many gates leave the range of half precision."""
    return x if x.dtype is torch.float64 else x.float()
