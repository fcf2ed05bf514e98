"""Feature pyramid on top of a plain backbone, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitarium.nn.tokens import TokenBackbone


class TokenPyramid(nn.Module):
    """Four maps at 4, 2, 1 and 1/2 times the resolution of a plain backbone (strides 4, 8, 16, 32 for patches of 16 pixels).

    Each map is the output of one block after two transposed convolutions, one, none, or a 2 x 2 max pooling, as in the segmentation models
    of BEiT and Vim. The head of the backbone is removed.

    Args:
        backbone: a backbone with patches on a grid.
        blocks: indices of the four blocks, from the finest map to the coarsest; None: evenly spread, including the last.

    Raises:
        ValueError: not four blocks.
        InputError: a block that the backbone does not have.
    """

    def __init__(self, backbone: TokenBackbone, blocks: Sequence[int] | None = None):
        super().__init__()
        depth = len(backbone.blocks)
        self.blocks = list(blocks) if blocks is not None else [max(0, round(depth * part / 4) - 1) for part in (1, 2, 3, 4)]
        if len(self.blocks) != 4:
            raise ValueError(f"blocks must be four indices, from the finest map to the coarsest; got {self.blocks}")
        backbone.take_indices(self.blocks)
        backbone.reset_classifier(0)
        self.backbone = backbone
        dim = int(backbone.num_features)
        self.channels = [dim] * 4
        self.scales = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)),
                nn.ConvTranspose2d(dim, dim, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the four maps (B, C, h_i, w_i) of images (B, in_chans, H, W)."""
        distinct = sorted(set(self.blocks))
        given = self.backbone.forward_intermediates(image, distinct, intermediates_only=True, stop_early=True)
        maps = dict(zip(distinct, given, strict=True))
        return [scale(maps[block]) for block, scale in zip(self.blocks, self.scales, strict=True)]
