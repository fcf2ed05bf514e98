"""Picture -> unit vector, with any image model: its embedding where it makes one, else the features that its classifier reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import UsageError
from vitarium.perception.retrieval.prompts import EmbeddingHead


def embeddings_of(model: nn.Module, image: Tensor) -> Tensor:
    """Prepared images (B, C, H, W) -> unit vectors (B, E) in float32.

    Raises:
        UsageError: the model neither embeds nor classifies images.
    """
    if any(isinstance(module, EmbeddingHead) for module in model.modules()):
        return F.normalize(model(image).float(), dim=-1)
    classifier = getattr(model, "get_classifier", lambda: None)()
    if isinstance(classifier, tuple | list):  # a class and a distillation token, each with its own
        classifier = classifier[0]
    if not isinstance(classifier, nn.Module):
        raise UsageError(f"a {type(model).__name__} makes no embeddings of pictures: it has no embedding head and is no classifier")
    seen: list[Tensor] = []

    def read(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    hook = classifier.register_forward_pre_hook(read)
    try:
        model(image)
    finally:
        hook.remove()
    if not seen or seen[0].shape[0] != len(image):
        raise UsageError(f"a {type(model).__name__} does not show the features that its classifier reads")
    return F.normalize(torch.flatten(seen[0].float(), 1), dim=-1)
