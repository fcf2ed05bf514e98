"""Image to patch map by one strided convolution."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.layers import LayerNorm2d


class PatchEmbed(nn.Module):
    """(B, in_chans, H, W) -> (B, embed_dim, ceil(H / p), ceil(W / p)): zeros fill an incomplete patch at the right and the bottom.

    Args:
        patch_size: side and stride p of a patch, pixels.
        in_chans: channels of the image.
        embed_dim: channels of the map.
        norm: whether a layer norm over the channels follows.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, *, norm: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = LayerNorm2d(embed_dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        bottom, right = -image.shape[-2] % self.patch_size, -image.shape[-1] % self.patch_size
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.norm(self.proj(image))
