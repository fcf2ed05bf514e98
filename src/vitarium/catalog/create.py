"""`create_model`, which builds image models of this library, timm and transformers by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.rebuilding import is_rebuilding, without_weights
from vitarium.catalog.registry import INPUT_KEYS, find_model
from vitarium.errors import UsageError, nearest


@dataclass(frozen=True)
class ModelSpec:
    """Arguments of `create_model` in plain values, from which a saved file rebuilds the model."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    image_size: int | Sequence[int] | None = None,
    frames: int | None = None,
    strict: bool = True,
    **arguments: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: ours ("swin_tiny", or with the tag of its weights "swin_tiny.in22k"), "timm/NAME", or "hf/OWNER/NAME" (a local folder in
            transformers' layout also works: "hf/./folder").
        num_classes: classes of the head, 0 for none; by default that of the variant or the checkpoint, else 1000.
        checkpoint: weights to load: a path, "hf:owner/name[/file]", or an http(s) address. Tensor names of the authors and of timm are
            recognised.
        pretrained: whether to find published weights by the variant's table; a tag in the name implies it.
        image_size: side of the square input, pixels, for the preprocessing (and for architectures that fix it); of our models with a
            position table of a rectangle also (height, width), of which the preprocessing takes the larger.
        strict: raise for a checkpoint that lacks parameters (a head of other classes is always allowed).
        frames: length of a video model's clip; `stride` beside it is the step between its frames (see `Preprocessing`).
        arguments: any of the constructor's.

    Returns:
        the model in training mode with float32 weights, with `spec`, `preprocessing` and, where known, `labels` set.

    Raises:
        UsageError: unknown name or argument; the message names near ones.
        CheckpointError: the weights are unreadable, unsafe or of another model.
    """
    name, _, tag = name.partition(".") if not name.startswith(("timm/", "hf/")) else (name, "", "")
    if is_rebuilding():  # nested in a saved model, whose file holds the weights
        checkpoint, pretrained, tag, arguments = None, False, "", without_weights(arguments)
    given = dict(arguments)
    for option, value, least in (("num_classes", num_classes, 0), ("image_size", image_size, 1), ("frames", frames, 1)):
        if value is None:
            continue
        if option == "image_size" and isinstance(value, Sequence) and not name.startswith(("timm/", "hf/")):
            given[option] = _rectangle(value)
            continue
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{option} must be a whole number of at least {least}, got {value!r}")
        given[option] = value

    if name.startswith("timm/"):
        from vitarium.catalog.foreign import create_timm

        model = create_timm(name.removeprefix("timm/"), pretrained=pretrained, **given)
    elif name.startswith("hf/"):
        from vitarium.catalog.foreign import create_transformers

        model = create_transformers(name.removeprefix("hf/"), pretrained=pretrained, **given)
    else:
        model = _create_ours(name, **given)
    model.spec = ModelSpec(name, given)  # type: ignore[assignment]
    model.weights_from = None  # type: ignore[assignment]  # where its weights come from, for `save(trained_only=True)`

    published = checkpoint is None and bool(tag or pretrained)
    if published and not name.startswith(("timm/", "hf/")):
        from vitarium.catalog.weights import fetch_pretrained

        checkpoint = fetch_pretrained(name, tag or None)
    if checkpoint is not None:
        from vitarium.catalog.checkpoints import load_checkpoint

        load_checkpoint(model, checkpoint, strict=strict, follow_head=num_classes is None)
    if published:
        model.weights_from = f"pretrained:{tag}"  # type: ignore[assignment]
    return model


def _rectangle(size: Sequence[Any]) -> tuple[int, int]:
    """Return a checked (height, width), pixels."""
    if isinstance(size, str) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UsageError(f"image_size must be a whole number of at least 1, or two of them (height, width), got {size!r}")
    return size[0], size[1]


def _create_ours(name: str, **given: Any) -> nn.Module:
    family, variant = find_model(name)
    parameters = inspect.signature(family.cls).parameters
    about_input = {k: v for k, v in given.items() if k in INPUT_KEYS and (k == "image_size" or "frames" in family.variants[variant])}
    given = {k: v for k, v in given.items() if k not in about_input or k in parameters}
    if isinstance(size := about_input.get("image_size"), tuple):
        if "image_size" not in parameters:
            raise UsageError(f"{name} has no position table: give image_size={max(size)}, the side of the square of the preprocessing")
        about_input["image_size"] = max(size)
    if wrong := [k for k in given if k not in parameters]:
        hint = nearest(wrong[0], parameters)
        raise UsageError(f"{name} takes no argument {wrong[0]!r}{hint} (it takes {', '.join(parameters)})")
    try:
        model = family.cls(**{**family.arguments(variant), **given})
    except (
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        IndexError,
    ) as error:  # checks of the constructor or torch, or a size of 0
        raise UsageError(f"{name} cannot be built with {given}: {error}") from error
    if getattr(model, "preprocessing", None) is None:  # else it wraps a model with its own preprocessing
        model.preprocessing = family.preprocessing(variant, in_chans=getattr(model, "in_chans", 3), **about_input)  # type: ignore[assignment]
    return model


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return a model's preprocessing, or the usual one of ImageNet at 224 pixels."""
    return getattr(model, "preprocessing", None) or Preprocessing()


def set_image_size(model: nn.Module, image_size: int) -> None:
    """Set the image size of a model: its preprocessing, and the position tables of timm's models with a fixed input.

    Args:
        image_size: side of the square image, pixels.

    Raises:
        UsageError: the model does not support the size.
    """
    if not isinstance(image_size, int) or image_size < 1:
        raise UsageError(f"image_size must be a whole number of at least 1, got {image_size!r}")
    if preprocessing_of(model).image_size == image_size:
        return
    if hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=image_size)  # type: ignore[operator]
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UsageError(f"{type(model).__name__} cannot take images of {image_size} pixels: {error}") from error
        if isinstance(spec := getattr(model, "spec", None), ModelSpec):
            model.spec = replace(spec, arguments={**spec.arguments, "image_size": image_size})  # type: ignore[assignment]
    model.preprocessing = replace(preprocessing_of(model), image_size=image_size)  # type: ignore[assignment]
