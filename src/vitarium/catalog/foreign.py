"""Image models that others wrote: timm's by name, transformers' vision models by repository or folder."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

from torch import Tensor, nn

from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.registry import Renamer
from vitarium.errors import CheckpointError, UsageError, nearest, require

# Small forms of timm's classics for 16x16 inputs and 16 tokens: they learn digits in seconds. (architecture, its arguments)
TIMM_PICO: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_pico": ("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=3)),
    "deit_pico": ("deit_tiny_distilled_patch16_224", dict(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=3)),
    "resnet_pico": ("resnet18", dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 96))),
}


def create_timm(name: str, *, pretrained: bool = False, image_size: int | None = None, **arguments: Any) -> nn.Module:
    """A model of timm's registry, with `preprocessing` from its own configuration. Extra arguments go to timm unchanged.

    Raises:
        UsageError: timm knows no such model or refuses an argument.
        CheckpointError: pretrained weights cannot be fetched.
    """
    import timm

    architecture, extra = TIMM_PICO.get(name, (name, {}))
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no model {name!r}{nearest(name, [*TIMM_PICO, *timm.list_models()])}")
    if pretrained and name in TIMM_PICO:
        raise UsageError(f"timm/{name} is a small form for demos and has no pretrained weights; timm/{architecture} has")
    arguments = {**extra, **arguments}
    if image_size is not None and "img_size" in arguments:
        arguments["img_size"] = image_size
    try:
        model = _timm_create(architecture, pretrained, image_size, arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"timm refuses {name!r} with {arguments or 'no arguments'}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot fetch timm's weights of {name!r}: {error}; pass checkpoint=PATH to a file you have") from error
    cfg = timm.data.resolve_data_config({}, model=model)
    size = image_size or (extra.get("img_size", 16) if name in TIMM_PICO else cfg["input_size"][-1])
    channels = arguments.get("in_chans", 3)
    mean, std = (cfg["mean"], cfg["std"]) if channels == 3 else ((0.5,), (0.5,))
    crop = 1.0 if size < 128 else cfg["crop_pct"]
    model.preprocessing = Preprocessing(size, mean, std, cfg["interpolation"], crop)  # type: ignore[assignment]
    model.labels = None  # type: ignore[assignment]
    return model


def _timm_create(architecture: str, pretrained: bool, image_size: int | None, arguments: dict[str, Any]) -> nn.Module:
    """Tell a model with a fixed input its size; one without says that it takes none, and needs none."""
    import timm

    if image_size is not None and "img_size" not in arguments:
        try:
            return timm.create_model(architecture, pretrained=pretrained, img_size=image_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(architecture, pretrained=pretrained, **arguments)


class TransformersClassifier(nn.Module):
    """A vision model of transformers behind our convention: image (B, 3, H, W) -> logits (B, num_classes)."""

    labels: list[str] | None = None

    def __init__(self, model: Any, preprocessing: Preprocessing):
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.num_classes: int = model.config.num_labels
        names = [str(model.config.id2label.get(i)) for i in range(self.num_classes)]
        if not any(name.startswith("LABEL_") for name in names):
            self.labels = names

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=image).logits

    def get_classifier(self) -> nn.Module:
        """The head: a linear layer, or identity where there are no classes."""
        return getattr(self.model, "classifier", None) or nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for `num_classes` (0: none).

        Raises:
            UsageError: the head is no plain linear layer; then `num_classes` must be given when the model is made.
        """
        old = self.get_classifier()
        if not isinstance(old, nn.Linear):
            raise UsageError(f"the head of {type(self.model).__name__} is a {type(old).__name__}; pass num_classes to create_model instead")
        fresh = nn.Linear(old.in_features, num_classes).to(old.weight) if num_classes else nn.Identity()
        self.model.classifier = fresh
        self.model.config.num_labels = self.num_classes = num_classes
        self.labels = None


def dialects_of_foreign(model: nn.Module) -> dict[str, Renamer]:
    """How the files of a foreign model's own world name its tensors: (dialect -> renamer), as a family's table."""
    if isinstance(model, TransformersClassifier):
        return {"transformers": lambda state: {f"model.{name}": tensor for name, tensor in state.items()}}
    convert = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    return {"timm": lambda state: convert(state, model)} if convert else {}  # authors' names -> timm's, position tables resized


def create_transformers(
    name: str, *, pretrained: bool = False, image_size: int | None = None, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    """An image classifier of transformers, from its configuration (random weights) or, with `pretrained`, with its weights.

    Args:
        name: "owner/name" on the hub (from the local cache when offline), or a folder beginning with "." or "/".

    Raises:
        MissingExtra: transformers is not installed.
        UsageError: it is no image classifier, or cannot be fetched.
    """
    transformers = require("transformers", "transformers")
    if num_classes is not None:
        arguments |= dict(num_labels=num_classes, id2label={i: f"LABEL_{i}" for i in range(num_classes)})
    if image_size is not None:
        arguments["image_size"] = image_size
    auto = transformers.AutoModelForImageClassification
    try:
        config = transformers.AutoConfig.from_pretrained(name, **arguments)
        model = auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True) if pretrained else auto.from_config(config)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot open 'hf/{name}': {first} (without a network, pass a folder in transformers' layout: hf/./FOLDER)"
        ) from error
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    except (OSError, ValueError):
        processor = {}
    size = image_size or getattr(config, "image_size", None) or 224
    size = size[0] if isinstance(size, list | tuple) else size
    plain = Preprocessing(size)
    crop = 1.0
    preprocessing = Preprocessing(
        size, tuple(processor.get("image_mean", plain.mean)), tuple(processor.get("image_std", plain.std)), "bicubic", crop
    )
    return TransformersClassifier(model, preprocessing)


def library_of(name: str) -> str:
    """What builds a model of this name besides us, with its version, such as "timm 1.0.31"; "" for our own."""
    library = {"timm": "timm", "hf": "transformers"}.get(name.partition("/")[0], "")
    return f"{library} {importlib.metadata.version(library)}" if library else ""


def configuration_of(model: Any) -> dict[str, Any]:
    """transformers' own configuration of a classifier, in plain values; `rebuild_transformers` makes the model again from it."""
    return json.loads(model.model.config.to_json_string(use_diff=False))


def rebuild_transformers(config: dict[str, Any]) -> TransformersClassifier:
    """The classifier of a saved configuration, with fresh weights; nothing is fetched, and no code but transformers' own runs.

    Raises:
        MissingExtra: transformers is not installed.
        UsageError: this transformers knows no such configuration.
    """
    transformers = require("transformers", "transformers")
    try:
        known = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForImageClassification.from_config(known)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"transformers {transformers.__version__} refuses the saved configuration: {error}") from error
    return TransformersClassifier(model, Preprocessing())
