"""Calling of models: example inputs by name, and the call itself.

    inputs = example_inputs(model, 2)          # {"image": ...} of a classifier; {"x": ..., "t": ..., "labels": ...} of a DiT
    output = call(model, inputs)

Every model that `@family` registers has `example_inputs(n, image_size=None, *, seed=0)`; a model that takes more than one image defines its
own. Models of timm, transformers and open_clip are supported through their configurations. Code that runs arbitrary models (probes, MACs,
benchmarks, export, calibration, explanation) uses this module instead of assuming an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import InputError, UsageError

Inputs = dict[str, Any]
"""Argument name of the model's forward -> value, in the order of its signature; tensors have the batch as their first axis."""

ImageSize = int | tuple[int, int]
TEXT_LENGTH = 16
"""Number of tokens of an example text, if the model takes as many."""


def example_inputs(model: nn.Module, n: int = 1, image_size: ImageSize | None = None, *, seed: int = 0) -> Inputs:
    """Return inputs that a model accepts; the same ones for the same arguments.

    Args:
        model: any module. Its own method `example_inputs` is used first; then its `preprocessing`, and the configurations of timm,
            transformers and open_clip.
        n: batch size, at least 1.
        image_size: side of the image, or (height, width), in pixels; by default the model's native size.
        seed: of the values.

    Returns:
        argument name -> tensor on the model's device, in the order of the forward's signature. Floating-point inputs have the dtype of the
        model's weights; labels, times and token numbers lie in the model's range.

    Raises:
        UsageError: n below 1, a size that the model does not support, or a model without information about its input.
    """
    if n < 1:
        raise UsageError(f"n must be at least 1, got {n}")
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return dict(own(n, image_size, seed=seed))
    foreign = {} if _image_shape(model) else _foreign_inputs(model, n, image_size, seed)
    return foreign or image_inputs(model, n, image_size, seed=seed)


def image_inputs(model: nn.Module, n: int = 1, image_size: ImageSize | None = None, *, seed: int = 0) -> Inputs:
    """Return the inputs of a model that takes one image (n, C, H, W), or one clip (n, C, T, H, W), of normally distributed values.

    This is the `example_inputs` of every registered model that defines none.

    Raises:
        UsageError: the model has no `preprocessing` and no timm configuration, and no size is given.
    """
    shape = _image_shape(model)
    if not shape and image_size is None:
        raise UsageError(
            f"the input of a {type(model).__name__} is not known: set model.preprocessing "
            "(vitarium.catalog.Preprocessing(image_size=...)) if it takes an image, or give it a method "
            "example_inputs(n, image_size=None, *, seed=0) that returns its inputs by name "
            f"(its forward takes {', '.join(p.name for p in _parameters(model))})"
        )
    shape = shape or (getattr(model, "in_chans", 3), 0, 0)
    return {first_argument(model): random_normal(model, (n, *shape[:-2], *_sides(image_size, shape[-2:])), seed=seed)}


def example_image(model: nn.Module, n: int = 1, image_size: ImageSize | None = None, *, seed: int = 0) -> Tensor:
    """Return the example image of a model that takes nothing else.

    Raises:
        UsageError: as `example_inputs`, or the model takes more than one input; the message names them.
    """
    inputs = example_inputs(model, n, image_size, seed=seed)
    if len(inputs) > 1:
        raise UsageError(f"this needs a model that is called with one image; a {type(model).__name__} takes {', '.join(inputs)}")
    return next(iter(inputs.values()))


def call(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | Tensor) -> Any:
    """Call a model with inputs by name (see `example_inputs`), in order, or with one tensor, and return its output.

    Raises:
        InputError: an input that the model's forward does not take, or a required one that is missing.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    if not isinstance(inputs, Mapping):
        return model(*inputs)
    args, named = arguments(model, inputs)
    return model(*args, **named)


def arguments(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Inputs]:
    """Split inputs by name into positional and keyword arguments: hooks and tracers see positional ones, so as many as possible are.

    Raises:
        InputError: as `call`.
    """
    parameters = _parameters(model)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or not parameters:  # a wrapper, such as a compiled model
        return ((next(iter(inputs.values())),), {}) if len(inputs) == 1 else ((), dict(inputs))
    takes = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    missing = [name for name in required_arguments(model) if name not in inputs]
    unknown = [] if anything else [name for name in inputs if name not in takes]
    if missing or unknown:
        wrong = f"no {missing[0]!r}" if missing else f"{unknown[0]!r}"
        accepted = ", ".join(p.name for p in parameters)
        raise InputError(f"{type(model).__name__} is called with {accepted}; got {wrong} among the inputs {', '.join(inputs) or '(none)'}")
    rest = dict(inputs)
    args: list[Any] = []
    for p in parameters:
        if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) or p.name not in rest:
            break
        args.append(rest.pop(p.name))
    return tuple(args), rest


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> Inputs:
    """Choose the fields of a batch that a model is called with: the arguments of its forward, or the batch's "image" for a model of images.

    Raises:
        InputError: the batch lacks a required input; the message names the model's inputs and the batch's fields.
    """
    required = required_arguments(model)
    if all(name in batch for name in required) and required:
        return {p.name: batch[p.name] for p in _parameters(model) if p.name in batch}
    if "image" in batch and len(required) <= 1:
        return {first_argument(model): batch["image"]}
    raise InputError(
        f"{type(model).__name__} is called with {', '.join(required)}, and the batch has the fields {', '.join(batch)}; "
        "give batches with fields of these names (model.example_inputs(n) shows one)"
    )


def required_arguments(model: nn.Module) -> list[str]:
    """Return the names of the arguments of a model's forward that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _parameters(model) if p.default is p.empty and p.kind in kinds]


def first_argument(model: nn.Module) -> str:
    """Return the name of the first argument of a model's forward; "image" if it has no name."""
    for p in _parameters(model):
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            return p.name
    return "image"


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


# ---- values


def random_normal(model: nn.Module, shape: Sequence[int], *, seed: int = 0) -> Tensor:
    """Return normally distributed values of a model's dtype and device, drawn on the CPU: the same on every device."""
    return _for(model, torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu"))


def random_uniform(model: nn.Module, shape: Sequence[int], low: float = 0.0, high: float = 1.0, *, seed: int = 0) -> Tensor:
    """Return values in [low, high) of a model's dtype and device."""
    return _for(model, low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), device="cpu"))


def random_integers(model: nn.Module, shape: Sequence[int], high: int, *, low: int = 0, seed: int = 0) -> Tensor:
    """Return int64 values in [low, high) on a model's device."""
    drawn = torch.randint(low, max(high, low + 1), tuple(shape), generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(_weight(model).device)


def _for(model: nn.Module, values: Tensor) -> Tensor:
    weight = _weight(model)
    return values.to(weight.device, weight.dtype)


def _weight(model: nn.Module) -> Tensor:
    """Return the first floating-point parameter, or buffer if all parameters are integers."""
    for values in (model.parameters(), model.buffers()):
        if (found := next((w for w in values if w.is_floating_point()), None)) is not None:
            return found
    return torch.empty(0)


# ---- input shapes from models' configurations


def _sides(image_size: ImageSize | None, own: Sequence[int]) -> tuple[int, int]:
    if image_size is None:
        return own[0], own[1]
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _image_shape(model: nn.Module) -> tuple[int, ...]:
    """Return (C, H, W), or (C, T, H, W) for clips, from a model's preprocessing or timm's configuration; () if it has neither."""
    preprocessing = getattr(model, "preprocessing", None)
    if preprocessing is not None:
        frames = (preprocessing.frames,) if getattr(preprocessing, "frames", None) else ()
        return (preprocessing.channels, *frames, preprocessing.image_size, preprocessing.image_size)
    if isinstance(patch_embed := getattr(model, "patch_embed", None), nn.Module):  # timm records here the image size of the constructor
        size, proj = getattr(patch_embed, "img_size", None), getattr(patch_embed, "proj", None)
        if size is not None and hasattr(proj, "in_channels"):  # a convolution, or its quantized replacement
            return (proj.in_channels, *size)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(cfg, dict) and cfg.get("input_size"):
        return tuple(cfg["input_size"])
    return ()


def _foreign_inputs(model: nn.Module, n: int, image_size: ImageSize | None, seed: int) -> Inputs:
    """Return inputs of open_clip's and transformers' models; empty for any other."""
    tower: Any = getattr(model, "visual", model)  # open_clip's
    if isinstance(size := getattr(tower, "image_size", None), tuple) and isinstance(conv := getattr(tower, "conv1", None), nn.Conv2d):
        inputs = {first_argument(model): random_normal(model, (n, conv.in_channels, *_sides(image_size, size)), seed=seed)}
        vocab, length = getattr(model, "vocab_size", None), getattr(model, "context_length", None)
        if tower is not model and isinstance(vocab, int) and isinstance(length, int):
            inputs["text"] = random_integers(model, (n, length), vocab, seed=seed)
        return inputs
    config = getattr(model, "config", None)
    return _transformers_inputs(model, config, n, image_size, seed) if config is not None else {}


def _transformers_inputs(model: nn.Module, config: Any, n: int, image_size: ImageSize | None, seed: int) -> Inputs:
    """Return pixels if the configuration has an image size, and token numbers if it has a vocabulary; CLIP and SigLIP have both."""
    takes = [p.name for p in _parameters(model)]
    vision, text = getattr(config, "vision_config", None) or config, getattr(config, "text_config", None) or config
    found: Inputs = {}
    size, vocab = getattr(vision, "image_size", None), getattr(text, "vocab_size", None)
    if size is not None:
        sides = _sides(image_size, (size, size) if isinstance(size, int) else tuple(size))
        name = "pixel_values" if "pixel_values" in takes else first_argument(model)
        if name in takes and name != "input_ids":
            found[name] = random_normal(model, (n, getattr(vision, "num_channels", 3), *sides), seed=seed)
    if vocab is not None and "input_ids" in takes:
        length = min(TEXT_LENGTH, getattr(text, "max_position_embeddings", None) or TEXT_LENGTH)
        ids = random_integers(model, (n, length), vocab, seed=seed)
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < vocab:
            ids[:, -1] = end  # CLIP's text tower takes its features at this token
        found["input_ids"] = ids
        if "attention_mask" in takes:
            found["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            found["decoder_input_ids"] = ids
    return {name: found[name] for name in takes if name in found}
