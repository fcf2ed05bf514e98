"""Images as sequences of square patches, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches, row by row: (B, C, h p, w p) -> (B, h w, p p C).

    Inside a patch the order is rows, columns, channels, with channels fastest, as in MAE.

    Raises:
        ValueError: a side is not a multiple of the patch size.
    """
    height, width = image.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} pixels do not fill an image of {height}x{width}; both sides must be multiples of it")
    grid = image.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, h, p, w, p)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify`: (B, h w, p p C) and (h, w) -> (B, C, h p, w p)."""
    pixels = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
