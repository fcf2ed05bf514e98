"""Unit vectors of images from any model: the output of its embedding head, or else the input of its classifier."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.features import classifier_input, is_read_by, pooled_features
from vitarium.perception.retrieval.prompts import EmbeddingHead


def embeddings_of(model: nn.Module, image: Tensor) -> Tensor:
    """Return unit vectors (B, E) in float32 of prepared images (B, C, H, W).

    Raises:
        UsageError: the model returns neither embeddings nor features.
    """
    if is_read_by(embeddings_of, model):
        return model(image)
    if any(isinstance(module, EmbeddingHead) for module in model.modules()):
        return F.normalize(model(image).float(), dim=-1)
    read = classifier_input if hasattr(model, "get_classifier") else pooled_features  # an autoencoder has an encoder and no classifier
    return F.normalize(read(model, image).float(), dim=-1)
