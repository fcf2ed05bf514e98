"""Pooled features of any image model: what its classifier reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError


def pooled_features(model: nn.Module, image: Tensor) -> Tensor:
    """Return what the classifier of a model reads of images, (B, C) in the model's dtype.

    By timm's methods (`forward_features`, `forward_head(pre_logits=True)`) where the model has them: ours, timm's, transformers'. Of an
    open_clip model its image features; of any other classifier the input of its head in a whole pass.

    Args:
        model: a backbone, an encoder or a classifier, in eval mode.
        image: prepared images (B, C, H, W), on the model's device.

    Raises:
        UsageError: a model that has neither.
    """
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        head: Any = model.forward_head
        features: Any = model.forward_features
        return head(features(image), pre_logits=True)
    if type(model).__module__.startswith("open_clip."):
        visual: Any = getattr(model, "visual", model)
        found = visual(image)
        return found[0] if isinstance(found, tuple) else found  # with the tokens beside it
    return classifier_input(model, image)


def classifier_input(model: nn.Module, image: Tensor) -> Tensor:
    """Return what enters the head (the first of two) when a classifier looks at images, (B, C).

    Raises:
        UsageError: it has no head, or does not call it once for all images.
    """
    classifier: Any = getattr(model, "get_classifier", lambda: None)()
    if isinstance(classifier, tuple | list):  # a class and a distillation token, each with its own
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
