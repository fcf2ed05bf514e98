"""Pooled features of any image model: the input of its classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError


def is_read_by(function: Any, model: nn.Module) -> bool:
    """Return whether a model is a graph that computes exactly this function of images (see `vitarium.efficiency.runtimes.run_with`): its
    output is then the function's result."""
    return getattr(model, "reads", None) is function


def pooled_features(model: nn.Module, image: Tensor) -> Tensor:
    """Return the input of a model's classifier for images, (B, C) in the model's dtype.

    Calls timm's methods (`forward_features`, `forward_head(pre_logits=True)`) if the model has them, as ours, timm's and wrapped
    transformers models do. For an open_clip model the result is its image features; for any other classifier, the input of its head in a
    forward pass.

    Args:
        model: a backbone, an encoder or a classifier, in eval mode.
        image: prepared images (B, C, H, W), on the model's device.

    Raises:
        UsageError: the model has neither these methods nor a classifier.
    """
    if is_read_by(pooled_features, model):
        return model(image)
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        head: Any = model.forward_head
        features: Any = model.forward_features
        return head(features(image), pre_logits=True)
    if type(model).__module__.startswith("open_clip."):
        visual: Any = getattr(model, "visual", model)
        found = visual(image)
        return found[0] if isinstance(found, tuple) else found  # a pair with the tokens
    return classifier_input(model, image)


def classifier_input(model: nn.Module, image: Tensor) -> Tensor:
    """Return the input of a classifier's head (of the first of two) in a forward pass, (B, C).

    Raises:
        UsageError: it has no head, or does not call it once for all images.
    """
    classifier: Any = getattr(model, "get_classifier", lambda: None)()
    if isinstance(classifier, tuple | list):  # the class token and the distillation token have a head each
        classifier = classifier[0]
    if not isinstance(classifier, nn.Module):
        raise UsageError(
            f"{type(model).__name__} does not give features (forward_features and forward_head, or a classifier that reads them); "
            "take a backbone, an encoder or a classifier"
        )
    seen: list[Tensor] = []

    def read(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    hook = classifier.register_forward_pre_hook(read)
    try:
        model(image)
    finally:
        hook.remove()
    if not seen or seen[0].shape[0] != len(image):
        raise UsageError(f"{type(model).__name__} does not call its classifier on the features of each image; take another model")
    return torch.flatten(seen[0], 1)
