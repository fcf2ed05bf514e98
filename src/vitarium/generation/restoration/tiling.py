"""Restoring large images in tiles, without seams.

Tiles overlap, and begin on the model's window grid. Near its border a tile lacks context: there only the neighbour is used, and in the
middle of the overlap the two are blended over `FADE` pixels.

If the overlap is at least twice `Restorer.reach` plus the fade, the result equals that of the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitarium.catalog.preprocessing import to_mode
from vitarium.errors import InputError, UsageError
from vitarium.generation.restoration.restorer import Restorer
from vitarium.ops.bicubic import resize_bicubic

FADE = 16
"""Pixels of the input over which neighbouring tiles are blended."""

MAX_PIXELS = 512_000_000
"""Largest number of pixels of a result, which is held in memory at 3 bytes per pixel."""


def strips(model: Restorer, image: Tensor, *, tile: int = 256, overlap: int = 32, ensemble: bool = False) -> Iterator[Tensor]:
    """Yield the restored image in strips from top to bottom, working on one row of tiles at a time.

    Args:
        model: restores one tile at a time, on its own device.
        image: (C, H, W) uint8, or floating-point in 0..1; on any device.
        tile: side of a tile, pixels of the input; 0 restores the image as a whole.
        overlap: overlap of neighbouring tiles, pixels of the input.
        ensemble: restore each tile in its 8 orientations, and return their mean (see `restored_in_all_orientations`).

    Yields:
        (C, rows, scale W) float32 on the CPU, not clipped.

    Raises:
        UsageError: the tile size does not suit the model.
    """
    size = model.multiple
    height, width = image.shape[-2:]
    if tile == 0:
        tile, overlap = max(height, width) + size, 0
    step = (tile - overlap) // size * size  # tiles begin on the model's window grid
    if overlap < 0 or step < max(overlap, size):
        least = max(overlap, -(-overlap // size) * size, size) + max(0, overlap)
        raise UsageError(f"an overlap of {overlap} pixels with windows of {size} needs tiles of at least {least}, got {tile} (0: no tiles)")
    rows, columns = _spans(height, step, overlap), _spans(width, step, overlap)
    carried = torch.zeros(0)  # last rows of the strip, to be blended with the next one
    for (top, bottom), here in zip(rows, _ramps(rows, overlap), strict=True):
        strip = torch.zeros(image.shape[0], (bottom - top) * model.scale, width * model.scale)
        for (left, right), across in zip(columns, _ramps(columns, overlap), strict=True):
            done = _restore(model, image[:, top:bottom, left:right], ensemble)
            strip[..., left * model.scale : right * model.scale] += done * _stretched(across, model.scale)
        strip *= _stretched(here, model.scale)[:, None]
        if carried.numel():
            strip[:, : carried.shape[1]] += carried
        finished = step * model.scale if bottom < height else strip.shape[1]
        carried = strip[:, finished:]
        yield strip[:, :finished]


def _spans(side: int, step: int, overlap: int) -> list[tuple[int, int]]:
    """Return (start, end) of tiles that begin every `step` pixels and reach `overlap` into the next."""
    starts = [start for start in range(0, side, step) if start == 0 or start + overlap < side]
    return [(start, min(side, start + step + overlap) if start != starts[-1] else side) for start in starts]


def _ramps(spans: list[tuple[int, int]], overlap: int) -> list[Tensor]:
    """Return the weight of each pixel of each tile along an axis; the weights of all tiles sum to 1 everywhere."""
    weights = [torch.ones(end - start) for start, end in spans]
    if overlap:
        fade = min(FADE, overlap)
        rise = ((torch.arange(overlap) + 0.5 - (overlap - fade) / 2) / fade).clamp(0, 1)
        for before, after in pairwise(weights):
            before[-overlap:] *= 1 - rise
            after[:overlap] *= rise
    return weights


def _stretched(weights: Tensor, scale: int) -> Tensor:
    return weights.repeat_interleave(scale)


def _restore(model: Restorer, tile: Tensor, ensemble: bool) -> Tensor:
    place = next(model.parameters())
    image = tile.to(place.device)
    image = image.to(place.dtype) / 255 if image.dtype == torch.uint8 else image.to(place.dtype)
    found = restored_in_all_orientations(model, image[None]) if ensemble else model(image[None])
    return found[0].float().cpu()


def restored_in_all_orientations(model: Restorer, image: Tensor) -> Tensor:
    """Restore an image in its 8 orientations (4 rotations, mirrored or not), turn the results back, and return their mean: the
    "self-ensemble" of published results (Timofte et al. 2016), 8 times the cost.

    Args:
        model: restores (B, C, H, W) in 0..1 to (B, C, scale H, scale W).
        image: (B, C, H, W).

    Returns:
        (B, C, scale H, scale W). A flip or rotation of the image flips or rotates the result, exactly up to rounding.
    """
    results = []
    for mirrored in (False, True):
        flat = image.flip(-1) if mirrored else image
        for turns in range(4):
            found = model(flat.rot90(turns, (-2, -1))).rot90(-turns, (-2, -1))
            results.append(found.flip(-1) if mirrored else found)
    return torch.stack(results).mean(0)


def restore_tensor(model: Restorer, image: Tensor, *, tile: int = 256, overlap: int = 32, ensemble: bool = False) -> Tensor:
    """Restore an image: (C, H, W) uint8, or floating-point in 0..1 -> (C, scale H, scale W) uint8, on the CPU. See `strips`."""
    out = torch.empty(image.shape[0], image.shape[1] * model.scale, image.shape[2] * model.scale, dtype=torch.uint8)
    row = 0
    for strip in strips(model, image, tile=tile, overlap=overlap, ensemble=ensemble):
        out[:, row : row + strip.shape[1]] = to_bytes(strip)
        row += strip.shape[1]
    return out


@torch.inference_mode()
def restore_image(model: Restorer, image: Image.Image, *, tile: int = 256, overlap: int = 32, ensemble: bool = False) -> Image.Image:
    """Restore an image in any of Pillow's modes to RGB or grey; transparency is enlarged bicubically. Arguments: see `strips`.

    Memory: both images at 3 bytes per pixel, a row of tiles, and the model's memory for one tile.

    Raises:
        InputError: the result would have more than `MAX_PIXELS`.
        UsageError: see `strips`.
    """
    pixels = image.width * image.height * model.scale**2
    if pixels > MAX_PIXELS:
        raise InputError(
            f"the result would have {pixels / 1e6:.0f} megapixels ({3 * pixels / 1e9:.1f} GB of memory); at most {MAX_PIXELS / 1e6:.0f} "
            "are made: crop the image first"
        )
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image.convert("RGBA").convert("RGB") if alpha else image
    restored = to_image(restore_tensor(model, to_tensor(colours, model.in_chans), tile=tile, overlap=overlap, ensemble=ensemble))
    if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"):
        restored = restored.convert("L")
    if alpha:
        restored.putalpha(to_image(to_bytes(resize_bicubic(to_tensor(alpha, 1).float() / 255, model.scale))))
    return restored


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Convert an image in any of Pillow's modes to (channels, H, W) uint8."""
    return torch.from_numpy(np.array(to_mode(image, channels))).view(image.height, image.width, channels).permute(2, 0, 1)


def to_image(image: Tensor) -> Image.Image:
    """Convert (3, H, W) or (1, H, W) uint8 to an RGB or grey image."""
    array: Any = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def to_bytes(image: Tensor) -> Tensor:
    """Clip and round floating-point values in 0..1 to uint8, as benchmarks do before measuring."""
    return (image.clamp(0, 1) * 255).round_().to(torch.uint8)
