"""Drawings of a token reduction: the patches that were kept, fused, dropped, or merged with others."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vitarium.anatomy import Tokens, of
from vitarium.catalog.create import preprocessing_of
from vitarium.efficiency.tokens.reducer import trace
from vitarium.errors import UsageError

GAP, CAPTION = 8, 18  # pixels


def picture(model: nn.Module, image: Image.Image, *, blocks: tuple[int, ...] | None = None, side: int = 224) -> Image.Image:
    """Draw a strip of panels: the model's input, and its tokens after some blocks.

    Args:
        model: with a token reduction.
        image: of any size and mode.
        blocks: numbers of the blocks, from 0; None: at most three of the reducing blocks.
        side: of each panel, pixels.

    Returns:
        the strip. A merged region is filled with its mean colour and outlined; fused patches are pale, dropped ones dark.

    Raises:
        UsageError: the model has no token reduction, or no such block.
    """
    preprocessing = preprocessing_of(model)
    pixels = preprocessing(image)
    weight = next(model.parameters())
    states = trace(model, pixels[None].to(weight.device, weight.dtype))
    grid = of(model).grid(*pixels.shape[-2:])
    chosen = _chosen(states) if blocks is None else blocks
    if wrong := [b for b in chosen if not 0 <= b < len(states)]:
        raise UsageError(f"the model has blocks 0 to {len(states) - 1}; {wrong[0]} is not among them")
    shown = _unnormalised(pixels, preprocessing.mean, preprocessing.std).resize((side, side), Image.Resampling.BICUBIC)
    panels = [(shown, f"{grid[0] * grid[1]} patches")]
    for b in chosen:
        panels.append((draw_tokens(shown, states[b], grid), f"block {b + 1}: {_image_tokens(states[b])} tokens"))
    strip = Image.new("RGB", (len(panels) * (side + GAP) - GAP, side + CAPTION), "white")
    pen = ImageDraw.Draw(strip)
    for i, (panel, caption) in enumerate(panels):
        strip.paste(panel, (i * (side + GAP), CAPTION))
        pen.text((i * (side + GAP) + 2, 3), caption, fill="black")
    return strip


def draw_tokens(image: Image.Image, state: Tokens, grid: tuple[int, int], *, index: int = 0) -> Image.Image:
    """Draw one panel: an image with the state of its tokens over it.

    Args:
        image: the model's input, at any size.
        state: from `trace`.
        grid: rows and columns of patches.
        index: number of the image in the batch.
    """
    rows, columns = grid
    source = _sources(state, index).reshape(rows, columns)
    fused = _fused(state, index)
    height, width = image.height, image.width
    top, left = (np.arange(n + 1) * size // n for n, size in ((rows, height), (columns, width)))
    label = np.repeat(np.repeat(source, np.diff(top), axis=0), np.diff(left), axis=1)
    colours = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    members, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(label.shape)
    means = np.stack([np.bincount(inverse.ravel(), colours[..., c].ravel()) / counts for c in range(3)], axis=1)
    patches = np.array([(source == m).sum() for m in members])
    merged = (patches > 1) & (members >= 0) & ~np.isin(members, fused)
    colours = np.where(merged[inverse][..., None], 0.25 * colours + 0.75 * means[inverse], colours)
    colours = np.where(np.isin(label, fused)[..., None], 0.25 * colours + 0.75 * 235, colours)
    colours = np.where((label < 0)[..., None], 0.12 * colours, colours)
    if merged.any():
        colours[_borders(label)] = 255
    return Image.fromarray(colours.round().clip(0, 255).astype(np.uint8))


def _chosen(states: list[Tokens]) -> tuple[int, ...]:
    before = [states[0].originals] + [_count(s) for s in states[:-1]]
    reduced = [i for i, s in enumerate(states) if _count(s) < before[i]]
    if len(reduced) > 3:
        reduced = [reduced[round(k * (len(reduced) - 1) / 3)] for k in (1, 2, 3)]
    return tuple(reduced)


def _count(state: Tokens) -> int:
    return state.originals if state.place is None else state.place.shape[1]


def _image_tokens(state: Tokens) -> int:
    return _count(state) - state.prefix


def _sources(state: Tokens, index: int) -> np.ndarray:
    if state.source is None:
        return np.arange(state.prefix, state.originals)
    return state.source[index, state.prefix :].cpu().numpy()


def _fused(state: Tokens, index: int) -> np.ndarray:
    """Return the indices of the tokens without a position."""
    return np.zeros(0, int) if state.place is None else (state.place[index] < 0).nonzero()[:, 0].cpu().numpy()


def _borders(label: np.ndarray) -> np.ndarray:
    edge = np.zeros(label.shape, bool)
    edge[1:] |= label[1:] != label[:-1]
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    return edge


def _unnormalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Image.Image:
    colours = pixels.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = (colours.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()
    return Image.fromarray(array)
