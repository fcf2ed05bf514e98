"""Search for the vision tower inside a model, and for its family."""

from __future__ import annotations

from torch import nn

from vitarium.anatomy import of_open_clip, of_ours, of_timm, of_transformers
from vitarium.anatomy.parts import Anatomy
from vitarium.catalog.calling import required_arguments
from vitarium.errors import UnsupportedModel

FAMILIES = (of_timm, of_transformers, of_open_clip, of_ours)
SUPPORTED = "timm's VisionTransformer and Eva, transformers' ViT, DeiT, BEiT, DINOv2, CLIP and SigLIP, open_clip's towers, ours"


def of(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model.

    A model may define `anatomy(self) -> Anatomy` itself; other towers are found by their class, at any depth (inside a
    classifier, a learner, or a pair of towers).

    Raises:
        UnsupportedModel: the model has no such tower, several, or one with an unknown part. The message gives the reason.
    """
    if callable(own := getattr(model, "anatomy", None)):
        return own()
    found = [(path, module, family) for path, module in model.named_modules() for family in FAMILIES if family.is_tower(module)]
    if not found:
        raise UnsupportedModel(f"{_name(model)} has no plain vision transformer in it{_lack(model)}; supported: {SUPPORTED}")
    if len(found) > 1:
        places = ", ".join(path or "the model itself" for path, _, _ in found)
        raise UnsupportedModel(f"{type(model).__name__} has {len(found)} vision transformers ({places}); give the method one of them")
    path, tower, family = found[0]
    return family.read(model, path, tower)


def _name(model: nn.Module) -> str:
    """Return the class name of a model, or of the other library's module that it wraps."""
    inner = getattr(model, "model", None)
    return type(inner if isinstance(inner, nn.Module) and hasattr(inner, "config") else model).__name__


def _lack(model: nn.Module) -> str:
    """Describe what the model lacks, for a message; "" if unknown."""
    reasons = []
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info) or []
    strides = sorted({row["reduction"] for row in rows if isinstance(row, dict) and "reduction" in row})
    depths = getattr(getattr(model, "config", None), "depths", None)  # a bare pyramid of transformers
    if len(strides) > 1:
        reasons.append(f"it is a pyramid with strides {', '.join(map(str, strides))} and no single sequence of tokens")
    elif isinstance(depths, list | tuple) and len(depths) > 1:
        reasons.append(f"it is a pyramid of {len(depths)} stages and has no single sequence of tokens")
    if len(inputs := required_arguments(model)) > 1:
        reasons.append(f"it is called with {', '.join(inputs)}, and its blocks depend on more than their tokens")
    if reasons and not any("attention" in type(part).__name__.lower() or "attn" in name.lower() for name, part in model.named_modules()):
        reasons.append("it has no attention")
    return f" ({'; '.join(reasons)})" if reasons else ""
