"""Parts of the pyramid vision transformers that descend from PVTv2 (Wang et al. 2022): patches, attention, MLP, checkpoint names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.layers import Linear
from vitarium.ops.attention import multi_head_attention
from vitarium.ops.maps import as_map, as_tokens

Grid = tuple[int, int]


class OverlapPatchEmbed(nn.Module):
    """Overlapping patch embedding by a strided convolution and a layer norm: (B, in_dim, H, W) -> (B, h, w, dim).

    Args:
        in_dim, dim: channels of the input map and of the output.
        stride: distance between patches.
        kernel_size: side of a patch, 2 * stride - 1 by default.
        padding: zeros on each side, stride - 1 by default, which makes h = ceil(H / stride).
        conv: layers before the strided convolution, such as a convolutional stem.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 2,
        *,
        kernel_size: int | None = None,
        padding: int | None = None,
        conv: nn.Module | None = None,
    ):
        super().__init__()
        self.conv = nn.Identity() if conv is None else conv
        self.kernel_size = 2 * stride - 1 if kernel_size is None else kernel_size
        self.stride, self.padding = stride, stride - 1 if padding is None else padding
        self.proj = nn.Conv2d(in_dim, dim, self.kernel_size, stride, self.padding)
        self.norm = nn.LayerNorm(dim)

    def grid(self, height: int, width: int) -> Grid:
        """Return the rows h and columns w of the patches of a map of height x width, as the strided convolution reads it."""
        rows, columns = ((side + 2 * self.padding - self.kernel_size) // self.stride + 1 for side in (height, width))
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class ReducedAttention(nn.Module):
    """Attention from every token of a map to a reduced set of tokens: (B, N, dim) of a grid -> the same shape.

    A subclass defines `reduce`. The keys and values are projected from the reduced tokens, which divides the cost by their ratio.

    Args:
        dim, num_heads: channels and heads.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        scale: factor on the logits, head_dim ** -0.5 by default.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, scale: float | None = None):
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """Reduce the tokens (B, N, dim) of a grid to those that keys and values are made from, (B, M, dim)."""
        raise NotImplementedError(f"{type(self).__name__} does not define reduce")

    def attend(self, q: Tensor, x: Tensor, grid: Grid, bias: Tensor | None = None) -> Tensor:
        """Attend from projected queries (B, Q, dim) to the tokens x (B, N, dim) of a grid: (B, Q, dim), before the output projection.

        `bias` is added to the logits, broadcastable to (B, heads, Q, M).
        """
        k, v = self.kv(self.reduce(x, grid)).chunk(2, 2)
        return multi_head_attention(q, k, v, self.num_heads, bias=None if bias is None else bias.to(q.dtype), scale=self.scale)

    def forward(self, x: Tensor, grid: Grid, bias: Tensor | None = None) -> Tensor:
        return self.proj(self.attend(self.q(x), x, grid, bias))


class GridMlp(nn.Module):
    """MLP with a depth-wise 3 x 3 convolution before its activation: tokens (B, N, dim) of a grid -> the same shape."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fc2(F.gelu(as_tokens(self.dwconv(as_map(self.fc1(x), grid)))))


def pvt_rules(stages: int, *inside: tuple[str, str]) -> list[tuple[str, str | None]]:
    """Return rules for `vitarium.catalog.rename` from PVT's names (`patch_embed1`, `block1.0`, `norm1`) to ours (`stages.0.downsample`,
    `stages.0.blocks.0`, `stages.0.norm`).

    Args:
        stages: number of stages.
        inside: (pattern, replacement) for names inside a block, matched at the start of the rest of the name and before the general rules.
    """
    rules: list[tuple[str, str | None]] = []
    for number in range(1, stages + 1):
        ours, block = f"stages.{number - 1}", rf"^block{number}\.(\d+)\."
        rules += [
            (rf"^patch_embed{number}\.", f"{ours}.downsample."),
            *((block + theirs, rf"{ours}.blocks.\1." + new) for theirs, new in (*inside, (r"mlp\.dwconv\.dwconv\.", "mlp.dwconv."))),
            (block, rf"{ours}.blocks.\1."),
            (rf"^norm{number}\.", f"{ours}.norm."),
        ]
    return rules
