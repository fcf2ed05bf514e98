"""Multi-head self-attention on PyTorch's fused kernel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.layers import Linear
from vitarium.nn.positions import apply_rotary
from vitarium.ops.attention import merge_heads, split_packed_heads


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T scale + bias) v, with an output projection: (B, N, dim) -> (B, N, dim).

    Args:
        dim: channels.
        num_heads: heads; must divide dim.
        qkv_bias: whether the joint projection has a bias. Its output is [q | k | v], each (heads, head_dim).
        qk_norm: norm class on each head's queries and keys, or None.
        scale: factor on the logits, head_dim ** -0.5 by default.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Raises:
        ValueError: dim is not divisible by num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: type[nn.Module] | None = None,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = scale or self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.attn_drop = attn_drop
        self.proj_drop = proj_drop

    def forward(self, x: Tensor, bias: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute self-attention.

        Args:
            x: tokens, (B, N, dim).
            bias: added to the logits, broadcastable to (B, heads, N, N), in the dtype of x; or a bool mask, True where a key takes part.
            rotary: table from `rotary_2d`, (2, N, head_dim).
        """
        q, k, v = split_packed_heads(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.attn_drop if self.training else 0.0, scale=self.scale)
        x = self.proj(merge_heads(x))
        return F.dropout(x, self.proj_drop, self.training)
