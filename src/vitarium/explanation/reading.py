"""Reading feature maps of any classifier in the same forward pass as its logits: timm's, transformers', torchvision's, ours, or any module.

A tap is either the name of a module, whose output a hook records during one pass, or the number of a stage if the model returns maps itself
(`forward_intermediates`, timm's contract). Tokens and channels-last maps are converted to maps (B, C, h, w) of the image.

Notation: B batch, N tokens, C channels, H and W sides of the image in pixels, h and w of a map in cells.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium import anatomy
from vitarium.anatomy import Anatomy
from vitarium.catalog.calling import example_image
from vitarium.errors import InputError, UnsupportedModel, UsageError, nearest
from vitarium.nn.backbone import Backbone
from vitarium.nn.modes import evaluating

Tap = str | int
Size = tuple[int, int]

COUNT = 3
"""Number of maps that are read by default."""
MAX_PREFIX = 8
"""Largest number of class, distillation and register tokens of a model whose anatomy is not known."""
MIN_CHANNELS = 4


def find_taps(model: nn.Module, count: int = COUNT) -> tuple[Tap, ...]:
    """Choose where to read a classifier.

    A plain vision transformer: the first norm of its last `count` blocks. A model with `forward_intermediates`: its last stages. Any other:
    the last modules that return maps at each of its `count` coarsest resolutions, found by a pass over an example.

    Raises:
        UnsupportedModel: no module returns a map.
    """
    if (view := plain(model)) is not None:
        return tuple(f"{block.name}.{block.layout.norm1}" for block in view.blocks[-count:])
    image = example_image(model, 2)
    info = getattr(model, "feature_info", None)
    if info is not None and hasattr(model, "forward_intermediates"):
        total = len(list(info))
        stages: tuple[Tap, ...] = tuple(range(max(0, total - count), total))
        with contextlib.suppress(Exception), evaluating(model):  # timm's methods may be missing, or give other logits
            want, (got, _) = model(image), read(model, image, stages)
            if image.is_meta or torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.std())):
                return stages
    return _probed(model, image, count)


def plain(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of a plain vision transformer, None for any other model."""
    try:
        return anatomy.of(model)
    except UnsupportedModel:
        return None


def read(model: nn.Module, image: Tensor, taps: Sequence[Tap]) -> tuple[Tensor, list[Tensor]]:
    """Run one pass: image (B, C, H, W) -> logits (B, num_classes), and the outputs at the taps, unchanged (see `as_map`).

    Raises:
        UsageError: a tap that does not exist or was not called, or a model without logits.
    """
    if not taps or len({type(tap) for tap in taps}) > 1:
        raise UsageError(f"taps are one or more names of modules, or numbers of stages, not both; got {list(taps)}")
    if isinstance(taps[0], int):
        features, maps = model.forward_intermediates(image, indices=list(taps))  # type: ignore[operator]
        return logits_of(model, model.forward_head(features)), maps  # type: ignore[operator]
    names = [str(tap) for tap in taps]
    with outputs_of(model, names) as seen:
        logits = logits_of(model, model(image))
    if absent := [name for name in names if name not in seen]:
        raise UsageError(f"{type(model).__name__} does not call {absent[0]!r} as a module; choose a tap that it calls")
    return logits, [seen[name] for name in names]


def read_maps(model: nn.Module, image: Tensor, taps: Sequence[Tap], *, multiply: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Run `read` and convert the outputs at the taps to maps (B, C_i, h_i, w_i).

    Args:
        multiply: whether the patches of a plain vision transformer are multiplied, channel by channel, by the class token of the same tap.

    Raises:
        UsageError: `multiply` for a model whose taps give no class token.
    """
    logits, raw = read(model, image, taps)
    size = (image.shape[-2], image.shape[-1])
    view = plain(model) if raw and raw[0].ndim == 3 else None
    maps = [as_map(x, size, view) for x in raw]
    if not multiply:
        return logits, maps
    if view is None or not view.class_token:
        raise UsageError(f"the taps of this {type(model).__name__} give no class token to multiply by; use class_token='drop'")
    return logits, [x * tokens[:, 0, :, None, None] for x, tokens in zip(maps, raw, strict=True)]


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """Return a classifier's output, if it is logits (B, num_classes).

    Raises:
        UsageError: it is anything else.
    """
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        found = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UsageError(f"explainers need a classifier, image -> logits (B, classes); {type(model).__name__} returned {found}")
    return output


@contextlib.contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the last output of modules by name (the first tensor of several), for passes inside the block and in this thread.

    Raises:
        UsageError: unknown module.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules or not name]:
        raise UsageError(f"{type(model).__name__} has no module {unknown[0]!r}{nearest(unknown[0], modules)}")
    seen: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def note(name: str, output: Any) -> None:
        if threading.get_ident() == thread and (tensor := _first_tensor(output)) is not None:
            seen[name] = tensor

    hooks = [modules[name].register_forward_hook(lambda _, __, output, name=name: note(name, output)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def as_map(x: Tensor, size: Size, view: Anatomy | None = None) -> Tensor:
    """Convert tokens (B, N, C), a map (B, C, h, w) or a channels-last map (B, h, w, C) of an image of this size to (B, C, h, w).

    Raises:
        InputError: the values form no grid of the image's shape, or tokens are missing (a token reduction is on the model).
    """
    if x.ndim == 4:
        last = _misfit(x.shape[1], x.shape[2], size) < _misfit(x.shape[2], x.shape[3], size)
        return x.permute(0, 3, 1, 2) if last else x
    if x.ndim != 3:
        raise InputError(f"a tap must return tokens (B, N, C) or a map (B, C, h, w), got {tuple(x.shape)}")
    if view is not None:
        grid, prefix = view.grid(*size), view.prefix
        if x.shape[1] != prefix + grid[0] * grid[1]:
            raise InputError(
                f"{x.shape[1]} tokens, but an image of {size[0]}x{size[1]} pixels has {prefix} + {grid[0]} x {grid[1]}: a token reduction "
                "is on the model (vitarium.undo removes it), or the model pads or crops to another size than the image's"
            )
        return tokens_to_map(x, prefix, grid)
    found = _grid(x.shape[1], size)
    if found is None:
        raise InputError(f"{x.shape[1]} tokens do not form a grid of an image of {size[0]}x{size[1]} pixels")
    return tokens_to_map(x, x.shape[1] - found[0] * found[1], found)


def tokens_to_map(x: Tensor, prefix: int, grid: Size) -> Tensor:
    """Drop prefix tokens and reshape the patches: (B, prefix + h w, C), row by row -> (B, C, h, w)."""
    return x[:, prefix:].transpose(1, 2).unflatten(2, grid)


def covered(model: nn.Module, tap: Tap | None, grid: Size, size: Size) -> Size:
    """Return the height and width in pixels that a map's cells cover: more than the image if the model pads its right and lower
    edge, less if it drops an edge, and the image's own if this is not known."""
    if (view := plain(model)) is not None:
        return grid[0] * view.patch_size[0], grid[1] * view.patch_size[1]
    if isinstance(model, Backbone) and isinstance(tap, int):
        info: dict[str, Any] = model.feature_info[tap]
        stride = info["reduction"]
        return grid[0] * stride, grid[1] * stride
    return size


def to_pixels(maps: Tensor, size: Size, cover: Size | None = None) -> Tensor:
    """Interpolate maps (B, h, w) of cells to pixels (B, H, W), bilinear; `cover` is the result of `covered`."""
    cover = cover or size
    pixels = F.interpolate(maps[:, None], cover, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    lower, right = size[0] - pixels.shape[-2], size[1] - pixels.shape[-1]
    return (F.pad(pixels, (0, right, 0, lower), mode="replicate") if lower or right else pixels)[:, 0]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _misfit(rows: int, columns: int, size: Size) -> float:
    """Return the deviation of a grid from the image's shape: up to max(size) if only a cell's rounding differs, inf if it is finer."""
    return abs(rows * size[1] - columns * size[0]) if rows <= size[0] and columns <= size[1] else float("inf")


def _grid(count: int, size: Size) -> Size | None:
    """Return the grid of an image's patches with `count` cells, or a few less (prefix tokens) if patches fit evenly; else None."""
    best: tuple[int, Size] | None = None
    for stride in range(1, max(size) + 1):
        even = size[0] % stride == size[1] % stride == 0
        for grid in ((-(-size[0] // stride), -(-size[1] // stride)), (size[0] // stride, size[1] // stride)):
            rest = count - grid[0] * grid[1]
            if 0 <= rest <= (min(MAX_PREFIX, grid[0] * grid[1]) if even else 0) and (best is None or rest < best[0]):
                best = rest, grid
    return best[1] if best else None


def _probed(model: nn.Module, image: Tensor, count: int) -> tuple[Tap, ...]:
    """Return the last modules that return maps at the coarsest resolutions of a pass."""
    latest: dict[Size, str] = {}
    size = (image.shape[-2], image.shape[-1])

    def note(name: str, output: Any) -> None:
        x = _first_tensor(output)
        if x is None or x.ndim not in (3, 4) or x.shape[0] != image.shape[0]:
            return
        if x.ndim == 3 and _grid(x.shape[1], size) is None:
            return
        found = as_map(x, size)
        grid = (found.shape[2], found.shape[3])
        if min(grid) > 1 and found.shape[1] >= MIN_CHANNELS and _misfit(*grid, size) <= max(size):
            latest.pop(grid, None)
            latest[grid] = name

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(lambda _, __, output, name=name: note(name, output)) for name, module in named]
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not latest:
        raise UnsupportedModel(f"no module of {type(model).__name__} returns maps or tokens of the image; name them with taps=[...]")
    coarsest = sorted(latest, key=lambda grid: grid[0] * grid[1])[:count]
    return tuple(latest[grid] for grid in reversed(coarsest))
