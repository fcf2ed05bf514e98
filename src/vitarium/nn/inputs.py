"""Checks of a model's inputs, one for every kind of argument: images and other floating-point tensors, class numbers, times.

All raise `InputError`, and return at once while a model is compiled or exported, since the graph then has fixed shapes and dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import InputError

Size = int | str
"""A fixed size of an axis, or the name of an axis of any size."""


def check_image(model: nn.Module, image: Any, in_chans: int | None, *, axes: str = "HW", min_size: int = 1, note: str = "") -> None:
    """Check an image (B, in_chans, H, W), or with axes "THW" a clip (B, in_chans, T, H, W).

    Args:
        in_chans: channels; None: any number of them.
        min_size: smallest height and width, pixels.
        note: range of the values for the message, such as " in 0..1".

    Raises:
        InputError: no tensor, or wrong rank, channels, layout, dtype, size or device; the message has the actual and the accepted value.
    """
    if torch.compiler.is_compiling():
        return
    name = type(model).__name__
    kind = "image" if axes == "HW" else "clip"
    accepted = f"{name} takes a floating-point {kind} (B, {', '.join(map(str, (in_chans or 'C', *axes)))}){note}"
    if not isinstance(image, Tensor):
        raise InputError(f"{accepted}, got {describe(image)}; {_conversion(image)}")
    shape, rank = tuple(image.shape), 2 + len(axes)
    if image.ndim != rank:
        hint = "; add a batch axis with image[None]" if image.ndim == rank - 1 else ""
        raise InputError(f"{accepted}, got {image.ndim} axes {shape}{hint}")
    if in_chans is not None and shape[1] != in_chans:
        order = ", ".join(map(str, (0, rank - 1, *range(1, rank - 1))))
        hint = (
            f"the channels seem to come last: image.permute({order})"
            if shape[-1] == in_chans
            else f"create the model with in_chans={shape[1]}"
        )
        raise InputError(f"{accepted}, got {shape[1]} channels in {shape}" + (f"; {hint}" if shape[1] else ""))
    if not image.is_floating_point():
        raise InputError(f"{accepted}, got {image.dtype}; divide by 255 and normalise (model.preprocessing does it)")
    if min(shape[2:]) < 1 or min(shape[-2:]) < min_size:
        frames = f" and {shape[2]} frames" if len(axes) == 3 else ""
        raise InputError(f"{name} takes images of at least {min_size}x{min_size} pixels, got {shape[-2]}x{shape[-1]}{frames}")
    check_placement(model, image, kind)


def check_floats(model: nn.Module, value: Any, sizes: Sequence[Size], argument: str) -> None:
    """Check a floating-point tensor whose axes have the given sizes, such as ("B", 3, "H", "W").

    Raises:
        InputError: no tensor, or another rank, size, dtype or device.
    """
    if torch.compiler.is_compiling():
        return
    accepted = f"{type(model).__name__} takes a floating-point {argument} ({', '.join(map(str, sizes))})"
    if not isinstance(value, Tensor):
        raise InputError(f"{accepted}, got {describe(value)}; {_conversion(value)}")
    fits = value.ndim == len(sizes) and all(isinstance(n, str) or n == m for n, m in zip(sizes, value.shape, strict=True))
    if not fits or not value.is_floating_point():
        raise InputError(f"{accepted}, got {value.dtype} {tuple(value.shape)}")
    check_placement(model, value, argument)


def check_placement(model: nn.Module, value: Tensor, argument: str) -> None:
    """Check that a floating-point tensor is dense and has the dtype (unless under autocast) and the device of the model's weights.

    Raises:
        InputError: it does not.
    """
    name = type(model).__name__
    if value.layout != torch.strided:
        raise InputError(f"{name} takes a dense {argument}, got {value.layout}; convert it with .to_dense()")
    weight = next((p for p in model.parameters() if p.is_floating_point()), value)
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(value.device.type):
        raise InputError(f"{name} holds {weight.dtype} weights, got a {value.dtype} {argument}; convert one of them with .to(dtype)")
    if value.device != weight.device:
        raise InputError(f"{name} is on {weight.device}, the {argument} on {value.device}; move one of them with .to(device)")


def check_classes(model: nn.Module, labels: Any, batch: int, last: int, device: torch.device) -> None:
    """Check class numbers: integers (B,), one per sample, from 0 to `last`.

    Values are checked on a CPU only: reading them from an accelerator would stall it at every call.

    Raises:
        InputError: no tensor, or another shape, dtype, device or class.
    """
    if torch.compiler.is_compiling():
        return
    accepted = f"{type(model).__name__} takes one class number per sample, an integer tensor ({batch},) of 0 to {last}"
    check_numbers(labels, (batch,), device, accepted, integers=True)
    if labels.device.type == "cpu" and batch and not (int(labels.min()) >= 0 and int(labels.max()) <= last):
        raise InputError(f"{accepted}, got {next(v for v in labels.tolist() if not 0 <= v <= last)}")


def check_times(model: nn.Module, t: Any, batch: int, device: torch.device) -> None:
    """Check times: finite real numbers (B,), one per sample.

    Raises:
        InputError: no tensor, or another shape, dtype or device.
    """
    check_numbers(t, (batch,), device, f"{type(model).__name__} takes one time per sample, a tensor ({batch},)")


def check_numbers(value: Any, shape: tuple[int, ...], device: torch.device, accepted: str, *, integers: bool = False) -> None:
    """Check a dense tensor of real numbers, of any dtype, or with `integers` of an integer dtype.

    Args:
        accepted: beginning of the message, with the shape.

    Raises:
        InputError: no tensor, or another shape, dtype or device.
    """
    if torch.compiler.is_compiling():
        return
    if not isinstance(value, Tensor):
        raise InputError(f"{accepted}, got {describe(value)}; {_conversion(value)}")
    if value.shape != shape:
        raise InputError(f"{accepted}, got {tuple(value.shape)}")
    wrong = value.is_complex() or value.dtype == torch.bool or (integers and value.is_floating_point())
    if wrong or value.layout != torch.strided:
        raise InputError(f"{accepted}, got {value.dtype} ({value.layout})")
    if value.device != device:
        raise InputError(f"{accepted} on {device}, got one on {value.device}; move it with .to({str(device)!r})")


@contextmanager
def foreign_sizes(model: nn.Module, image: Any, in_chans: int | None) -> Iterator[None]:
    """Check an image for a wrapper of another library's model, and turn that model's refusal of the image's size into `InputError`.

    The sizes that such a model takes are known to its own code only.

    Args:
        model: the wrapper, with the `preprocessing` of the model inside.
        in_chans: channels; None: unknown.

    Raises:
        InputError: see `check_image`; or the model refused a size that differs from its own.
    """
    if torch.compiler.is_compiling():
        yield
        return
    check_image(model, image, in_chans)
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        own = getattr(getattr(model, "preprocessing", None), "image_size", None)
        if isinstance(error, InputError) or own is None or tuple(image.shape[-2:]) == (own, own):
            raise
        size = "x".join(map(str, image.shape[-2:]))
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{type(model).__name__} does not take images of {size} pixels ({first}); its own size is {own}x{own}") from error


def describe(value: Any) -> str:
    """Return what a value is, for an error message: "None", "a list", "an array (2, 3, 8, 8) of float32", "an image of 8x6 pixels"."""
    if value is None:
        return "None"
    if hasattr(value, "convert") and hasattr(value, "size"):  # Pillow
        return f"an image of {'x'.join(map(str, value.size))} pixels"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {tuple(value.shape)} of {value.dtype}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _conversion(value: Any) -> str:
    """Return how a value that is no tensor is converted, for an error message."""
    if hasattr(value, "convert") and hasattr(value, "size"):
        return "model.preprocessing(image)[None] makes the tensor"
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return "vitarium.predict reads files"
    if hasattr(value, "shape") or isinstance(value, (list, tuple, int, float)):
        return "convert it with torch.as_tensor"
    return "give it a tensor"


def nearest_multiples(sides: Sequence[int], multiple: int) -> str:
    """Return the sizes nearest to `sides` that `multiple` divides, for an error message: "32x48"."""
    return "x".join(str(max(multiple, math.floor(side / multiple + 0.5) * multiple)) for side in sides)
