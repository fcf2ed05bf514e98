"""Drawings for the pages of the systems, computed by the systems' own code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import vitarium
from vitarium.data.photos import sample_photos
from vitarium.ops.windows import window_layout

COLOURS = np.array(
    [(0, 121, 107), (255, 160, 0), (94, 53, 177), (216, 67, 21), (2, 119, 189), (104, 159, 56), (173, 20, 87), (69, 90, 100), (121, 85, 72)]
)


def swin() -> bytes:
    """Draw a photograph under Swin's two grids: 16 x 16 tokens, windows of 4 x 4, unshifted and shifted by 2."""
    side, size, cell = 16, 4, 24
    photo = _photo(side * cell)
    panels = []
    for shift in ((0, 0), (size // 2, size // 2)):
        layout = window_layout(side, side, size, shift)
        window = torch.arange(side * side) // size**2
        region = layout.region.flatten() if layout.region is not None else torch.zeros(side * side, dtype=torch.long)
        of_token = torch.stack([window, region])[:, layout.inverse].view(2, side, side).numpy()
        panels.append(_grid(photo, of_token[0], of_token[1], cell))
    return _png(np.concatenate([panels[0], np.full((side * cell, 16, 3), 255, np.uint8), panels[1]], 1))


def _grid(photo: np.ndarray, window: np.ndarray, region: np.ndarray, cell: int) -> np.ndarray:
    """Tint tokens by region, with lines where the window or the region changes."""
    tint = COLOURS[region % len(COLOURS)].repeat(cell, 0).repeat(cell, 1)
    picture = Image.fromarray((0.6 * photo + 0.4 * tint).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    key = window * 16 + region
    side = len(key)
    for y in range(side):
        for x in range(side):
            if x and key[y, x] != key[y, x - 1]:
                draw.line([(x * cell, y * cell), (x * cell, (y + 1) * cell)], fill="white", width=3)
            if y and key[y, x] != key[y - 1, x]:
                draw.line([(x * cell, y * cell), ((x + 1) * cell, y * cell)], fill="white", width=3)
    return np.asarray(picture)


def convnext() -> bytes:
    """Draw effective receptive fields of ConvNeXt's last map for four kernel sizes, mean over random images."""
    panels = []
    for kernel in (3, 5, 7, 9):
        torch.manual_seed(0)
        model = vitarium.create_model("convnext_pico", depths=(3, 3), kernel_size=kernel).eval()
        image = torch.randn(16, 3, 64, 64, requires_grad=True)
        model.forward_features(image)[:, :, 8, 8].sum().backward()
        field = image.grad.abs().mean((0, 1)).clamp(min=1e-8).log10().numpy()
        share = ((field - field.max() + 4) / 4).clip(0, 1).repeat(3, 0).repeat(3, 1)[..., None]  # four decades
        panels += [((1 - share) * (244, 246, 246) + share * (0, 96, 86)).astype(np.uint8), np.full((192, 8, 3), 255, np.uint8)]
    return _png(np.concatenate(panels[:-1], 1))


def vim() -> bytes:
    """Draw the hidden attention of the class token in three blocks of a small trained Vim (docs/examples/vim_attention.json)."""
    side = 176
    maps = json.loads((Path(__file__).parent / "examples" / "vim_attention.json").read_text(encoding="utf-8"))
    photos = {name: photo.convert("RGB") for name, photo in sample_photos()}
    rows = []
    for name in dict.fromkeys(row["photo"] for row in maps):
        panels = [_middle(photos[name], side)]
        for taken in (np.array(row["taken"]) for row in maps if row["photo"] == name):
            share = (1 + np.log10(taken / taken.max() + 1e-9) / 2).clip(0, 1)
            share = share.repeat(side // len(taken), 0).repeat(side // len(taken), 1)[..., None]
            panels += [np.full((side, 8, 3), 255, np.uint8), ((1 - share) * (244, 246, 246) + share * (0, 96, 86)).astype(np.uint8)]
        rows += [np.concatenate(panels, 1), np.full((8, 4 * side + 24, 3), 255, np.uint8)]
    return _png(np.concatenate(rows[:-1]))


def _middle(photo: Image.Image, side: int) -> np.ndarray:
    shorter = min(photo.size)
    left, top = (photo.width - shorter) // 2, (photo.height - shorter) // 2
    return np.asarray(photo.crop((left, top, left + shorter, top + shorter)).resize((side, side)))


def _photo(side: int) -> np.ndarray:
    photo = next(iter(sample_photos()))[1].convert("RGB")
    shorter = min(photo.size)
    return np.asarray(photo.crop((0, 0, shorter, shorter)).resize((side, side)))


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    for name in ("swin", "convnext", "vim"):
        Path(f"{name}.png").write_bytes(globals()[name]())
