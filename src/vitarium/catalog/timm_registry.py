"""Registration of our models with timm: `timm.create_model("vitarium_swin_tiny", num_classes=10)`, `features_only=True` included.

timm's registry requires one function per model, in a module that lists default configurations; this is that module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from vitarium.catalog.create import create_model
from vitarium.catalog.registry import Family, families
from vitarium.errors import UsageError
from vitarium.nn.backbone import Backbone, VideoBackbone

__all__ = ["register_with_timm"]

PREFIX = "vitarium_"

default_cfgs: dict[str, Any] = {}
"""Default configuration of each model and its weights, under the name that timm expects."""


def register_with_timm() -> list[str]:
    """Register our image classifiers with timm as `vitarium_<name>`. A further call adds new models.

    Models of videos, detectors, generators and wrappers are left out: timm's tools call every registered model with one image and expect
    class scores.

    Returns:
        the registered names, such as "vitarium_swin_tiny".
    """
    import timm

    names = []
    for family in (f for f in families() if issubclass(f.cls, Backbone) and not issubclass(f.cls, VideoBackbone)):
        for variant, name in zip(family.variants, family.model_names(), strict=True):
            names.append(PREFIX + name)
            if not timm.is_model(PREFIX + name):
                default_cfgs[PREFIX + name] = _description(family, variant)
                timm.models.register_model(_entrypoint(name))
    return names


def _description(family: Family, variant: str) -> Any:
    """Return timm's configuration of a model: input and tags; `url` is the first source, which only `_entrypoint` uses."""
    from timm.models import generate_default_cfgs

    pre = family.preprocessing(variant)
    input_ = dict(input_size=(3, pre.image_size, pre.image_size), mean=pre.mean, std=pre.std, crop_pct=pre.crop_pct)
    common = dict(**input_, interpolation=pre.interpolation, classifier="head", num_classes=None)
    tags = family.weights.get(variant, {})
    name = f"{PREFIX}{family.name}_{variant}"
    return generate_default_cfgs({f"{name}.{tag}": dict(url=sources[0], **common) for tag, sources in tags.items()} or {name: common})[name]


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm calls for one model."""

    def build(pretrained: bool = False, cache_dir: Any = None, **arguments: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        if cache_dir is not None:
            raise UsageError("cache_dir is not supported; set HF_HOME or TORCH_HOME instead")
        tag = arguments.get("pretrained_cfg")
        weights = _weights(name, tag, arguments.get("pretrained_cfg_overlay")) if pretrained else {}
        feature_cfg = dict(out_indices=None, feature_cls="getter")
        model: Any = build_model_with_cfg(_Builder(name, weights), PREFIX + name, False, feature_cfg=feature_cfg, **arguments)
        model.pretrained_cfg.setdefault("num_classes", getattr(model, "num_classes", 0))
        return model

    build.__name__ = build.__qualname__ = PREFIX + name
    setattr(sys.modules[__name__], build.__name__, build)
    return build


def _weights(name: str, cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """Return the source of pretrained weights: a file or address from the caller's configuration, else from the family's table."""
    given = {**(cfg if isinstance(cfg, dict) else {}), **(overlay or {})}
    if given.get("hf_hub_id"):
        return dict(checkpoint="/".join(filter(None, (f"hf:{given['hf_hub_id']}", given.get("hf_hub_filename")))))
    if source := given.get("file") or given.get("url"):
        return dict(checkpoint=source)
    return dict(pretrained=True, tag=cfg if isinstance(cfg, str) and cfg else None)


class _Builder:
    """Call create_model with the arguments that timm passes to a model class."""

    def __init__(self, name: str, weights: dict[str, Any]):
        self.name = name
        self.weights = weights

    def __call__(self, *, img_size: Any = None, global_pool: str | None = None, **arguments: Any) -> nn.Module:
        weights = dict(self.weights)
        tag = weights.pop("tag", None)
        if img_size is not None:
            arguments["image_size"] = img_size if isinstance(img_size, int) else max(img_size)
        model = create_model(f"{self.name}.{tag}" if tag else self.name, **weights, **arguments)
        if global_pool is not None:
            model.reset_classifier(model.num_classes, global_pool)  # type: ignore[operator]
        return model
