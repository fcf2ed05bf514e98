"""Patch embedding by a strided convolution."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.layers import LayerNorm2d


class PatchEmbed(nn.Module):
    """Patch embedding: (B, in_chans, H, W) -> (B, embed_dim, h, w) with h = ceil((H - p) / s) + 1.

    Incomplete patches at the right and the bottom are padded with zeros.

    Args:
        patch_size: side p of a patch, pixels.
        in_chans: channels of the image.
        embed_dim: channels of the map.
        norm: add a layer norm over the channels.
        stride: s, pixels between patches; p by default (adjacent patches).
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, *, norm: bool = False, stride: int | None = None):
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, self.stride)
        self.norm = LayerNorm2d(embed_dim) if norm else nn.Identity()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of height x width."""
        rows, columns = (max(0, -(-(side - self.patch_size) // self.stride)) + 1 for side in (height, width))
        return rows, columns

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        rows, columns = self.grid(height, width)
        bottom, right = (self.patch_size + (n - 1) * self.stride - side for n, side in ((rows, height), (columns, width)))
        if bottom > 0 or right > 0:
            image = F.pad(image, (0, max(0, right), 0, max(0, bottom)))
        return self.norm(self.proj(image))
