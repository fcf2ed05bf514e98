"""Finding the vision tower inside a model, and the family that reads it."""

from __future__ import annotations

from torch import nn

from vitarium.anatomy import of_open_clip, of_ours, of_timm, of_transformers
from vitarium.anatomy.parts import Anatomy
from vitarium.errors import UnsupportedModel

FAMILIES = (of_timm, of_transformers, of_open_clip, of_ours)
SUPPORTED = "timm's VisionTransformer and Eva, transformers' ViT, DeiT, DINOv2, CLIP and SigLIP, open_clip's towers, ours"


def of(model: nn.Module) -> Anatomy:
    """The anatomy of a model.

    A model may define `anatomy(self) -> Anatomy` itself; the others are found by their class, at any depth (a classifier, a learner, or a
    pair of towers may be around them).

    Raises:
        UnsupportedModel: there is no such tower in it, more than one, or one with a part that is not known. The message says which.
    """
    if callable(own := getattr(model, "anatomy", None)):
        return own()
    found = [(path, module, family) for path, module in model.named_modules() for family in FAMILIES if family.is_tower(module)]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no plain vision transformer in it; supported: {SUPPORTED}")
    if len(found) > 1:
        places = ", ".join(path or "the model itself" for path, _, _ in found)
        raise UnsupportedModel(f"{type(model).__name__} has {len(found)} vision transformers ({places}); give the method one of them")
    path, tower, family = found[0]
    return family.read(model, path, tower)
