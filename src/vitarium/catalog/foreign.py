"""Image models of other libraries: timm's by name, transformers' vision models by repository or folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitarium.catalog.dialects import VIT_DIALECTS, from_google_mixer
from vitarium.catalog.heads import head_names, mark_fresh
from vitarium.catalog.hub import advice, hub_or_cache
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.rebuilding import WEIGHT_KEYS, is_rebuilding, refuse_files
from vitarium.catalog.registry import Renamer, State, chain
from vitarium.catalog.transformers_models import TOWERS, TransformersClassifier, VisionTower, wrap
from vitarium.errors import CheckpointError, UsageError, nearest, require

# Small variants of timm's classics for 16x16 inputs and 16 tokens, which learn digits in seconds: (architecture, its arguments)
TIMM_PICO: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_pico": ("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=3)),
    "deit_pico": ("deit_tiny_distilled_patch16_224", dict(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=3)),
    "resnet_pico": ("resnet18", dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 96))),
}


def create_timm(name: str, *, pretrained: bool = False, image_size: int | None = None, **arguments: Any) -> nn.Module:
    """Create a model of timm's registry, with `preprocessing` from its pretrained configuration. Extra arguments go to timm unchanged.

    Raises:
        UsageError: timm has no such model or rejects an argument.
        CheckpointError: pretrained weights cannot be fetched.
    """
    import timm

    architecture, extra = TIMM_PICO.get(name, (name, {}))
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no model {name!r}{nearest(name, [*TIMM_PICO, *timm.list_models()])}")
    if pretrained and name in TIMM_PICO:
        raise UsageError(f"timm/{name} is a small variant for demos and has no pretrained weights; timm/{architecture} has")
    arguments = {**extra, **arguments}
    if image_size is not None and "img_size" in arguments:
        arguments["img_size"] = image_size
    repository = _timm_repository(architecture) if pretrained and not arguments.get("pretrained_cfg_overlay") else "."
    try:
        with _hub_or_cache(repository, f"cannot fetch timm's weights of {name!r}"):
            model = _timm_create(architecture, pretrained, image_size, arguments)
    except CheckpointError:
        raise
    except (TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise UsageError(f"timm refuses {name!r} with {arguments or 'no arguments'}: {error}") from error
    except OSError as error:
        remedy = "pass checkpoint=PATH (--checkpoint PATH) to a file you have"
        raise CheckpointError(f"cannot fetch timm's weights of {name!r}: {error}; {remedy}") from error
    cfg = timm.data.resolve_data_config({}, model=model)
    size = image_size or (extra.get("img_size", 16) if name in TIMM_PICO else cfg["input_size"][-1])
    channels = arguments.get("in_chans", 3)
    mean, std = (cfg["mean"], cfg["std"]) if channels == 3 else ((0.5,), (0.5,))
    crop = 1.0 if size < 128 else cfg["crop_pct"]
    model.preprocessing = Preprocessing(size, mean, std, cfg["interpolation"], crop)  # type: ignore[assignment]
    model.labels = None  # type: ignore[assignment]
    own = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if pretrained and arguments.get("num_classes") not in (None, own):
        mark_fresh(model, head_names(model), f"timm's weights of {name} hold a head of {own or 'no'} classes")
    return model


@contextlib.contextmanager
def _hub_or_cache(repository: str, what: str) -> Iterator[None]:
    """Read a repository from the hub, or from its cache if the hub is out of reach (see `hub_or_cache`).

    Raises:
        CheckpointError: the hub is out of reach, and a file is in no cache.
    """
    with hub_or_cache(repository) as reason:
        try:
            yield
        except OSError as error:
            if not reason:
                raise
            raise CheckpointError(f"{what}: {advice(repository, reason)}") from error


def _timm_repository(architecture: str) -> str:
    """Return the hub's repository of timm's default weights; "." if they lie elsewhere."""
    import timm

    return getattr(timm.models.get_pretrained_cfg(architecture), "hf_hub_id", None) or "."


def _timm_create(architecture: str, pretrained: bool, image_size: int | None, arguments: dict[str, Any]) -> nn.Module:
    """Create the model, with `img_size` if its class takes one; other classes accept any size."""
    import timm

    if image_size is not None and "img_size" not in arguments:
        try:
            return timm.create_model(architecture, pretrained=pretrained, img_size=image_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(architecture, pretrained=pretrained, **arguments)


def dialects_of_foreign(model: nn.Module) -> dict[str, Renamer]:
    """Return the renamers (by dialect) for checkpoints of a foreign model from other sources, in the format of a family's table."""
    if isinstance(model, TransformersClassifier):
        return {"transformers": lambda state: _own_names(model, state)}
    modules = [sys.modules.get(cls.__module__) for cls in type(model).__mro__ if cls.__module__.startswith("timm.models.")]
    convert = next((m.checkpoint_filter_fn for m in modules if hasattr(m, "checkpoint_filter_fn")), None)
    if convert is None:
        return {}
    # timm's filter converts the authors' names and resizes position tables
    read: dict[str, Renamer] = {"timm": lambda state: convert(state, model)}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        read["deit3"] = lambda state: convert(state, model, adapt_layer_scale=True)
    if isinstance(getattr(model, "patch_embed", None), nn.Module):
        read |= {name: chain(rename, read["timm"]) for name, rename in VIT_DIALECTS.items()}
    if type(model).__name__ == "MlpMixer":
        read["google"] = chain(from_google_mixer, read["timm"])
    return read


def _own_names(model: TransformersClassifier, state: State) -> State:
    """Rename the tensors of any release of transformers to this model's names, by transformers' own rules."""
    bare = model.model.vision_model if isinstance(model.model, VisionTower) else model.model
    place = "model.vision_model." if isinstance(model.model, VisionTower) else "model."
    head = {f"model.{name}": t for name, t in state.items() if name.startswith("classifier.")} if bare is not model.model else {}
    rest = {name: t for name, t in state.items() if not (head and name.startswith("classifier."))}
    with quiet_transformers():
        loaded, info = type(bare).from_pretrained(None, config=bare.config, state_dict=rest, ignore_mismatched_sizes=True, **LOADING)
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    named = {f"{place}{name}": t for name, t in loaded.state_dict().items() if name not in lacking}
    return head | named | {f"{place}{name}": rest[name] for name in info["unexpected_keys"] if name in rest}


def create_transformers(
    name: str, *, pretrained: bool = False, image_size: int | None = None, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    """Build an image model of transformers, from its configuration (random weights) or, with `pretrained`, with its weights.

    For a dual encoder (CLIP, SigLIP) that is no classifier, the vision tower is taken. If the weights have no classifier, neither has the
    model, and `forward` returns pooled features, unless `num_classes` is given; the new head is then marked as untrained (see `heads`).

    Args:
        name: "owner/name" on the hub (from the local cache when offline), or a folder beginning with "." or "/".

    Raises:
        MissingExtra: transformers is not installed.
        UsageError: it is no image model, or cannot be fetched.
        CheckpointError: the weights lack more than a classifier, or the hub is out of reach.
    """
    refuse_files(f"the configuration of hf/{name}", configuration=True)
    if is_rebuilding():
        check_configuration(arguments, "arguments")
    transformers = require("transformers", "transformers")
    try:
        with _hub_or_cache(name, f"cannot open 'hf/{name}'"), quiet_transformers():
            config = _vision_config(transformers.AutoConfig.from_pretrained(name, **arguments))
            if num_classes is not None:
                config.num_labels = num_classes
                config.id2label = {i: f"LABEL_{i}" for i in range(num_classes)}
            if image_size is not None and not pretrained:
                # with pretrained weights the position table keeps its size and is interpolated for images of another size
                config.image_size = image_size
            module, lacking = _load(transformers, name, config, num_classes) if pretrained else (_build(transformers, config), [])
            preprocessing = _preprocessing(transformers, name, config, image_size)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        absent = name.startswith((".", "/")) and not Path(name).is_dir()
        first = f"there is no folder {name}" if absent else str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot open 'hf/{name}': {first} (without a network, pass a folder in transformers' layout: hf/./FOLDER)"
        ) from error
    model = wrap(module, preprocessing)
    if lacking:
        mark_fresh(model, [f"model.{n}" for n in lacking], f"the weights of hf/{name} hold no head of {model.num_classes} classes")
    return model


LOADING: dict[str, Any] = dict(output_loading_info=True, dtype=torch.float32)
"""Options for loading with transformers: return a report, and convert to float32."""
UNUSED = ("mask_token", "pooler.dense.weight", "pooler.dense.bias")
"""Endings of the names of parameters that no classifier uses."""


def _vision_config(config: Any) -> Any:
    """Return the vision tower's configuration of a dual encoder that is no classifier; any other configuration unchanged."""
    vision = getattr(config, "vision_config", None)
    classifier = any(name.endswith("ForImageClassification") for name in getattr(config, "architectures", None) or [])
    return vision if vision is not None and not classifier and hasattr(vision, "model_type") else config


def _build(transformers: Any, config: Any) -> nn.Module:
    """Build transformers' classifier of a configuration, or its bare tower with a head of ours, with random weights.

    Raises:
        ValueError: it is neither.
    """
    auto = transformers.AutoModelForImageClassification
    if type(config) in auto._model_mapping:
        return auto.from_config(config)
    tower = transformers.AutoModel.from_config(config)
    if type(tower).__name__ not in TOWERS:
        raise ValueError(f"a {type(tower).__name__} is no image classifier and no vision tower that is known here")
    return VisionTower(tower, config.num_labels)


def _load(transformers: Any, name: str, config: Any, num_classes: int | None) -> tuple[nn.Module, list[str]]:
    """Build as `_build` and load the weights of a repository or folder; also return the head's parameters that they lack.

    Raises:
        CheckpointError: the weights lack more than a head.
    """
    whole = type(config) in transformers.AutoModelForImageClassification._model_mapping
    auto = transformers.AutoModelForImageClassification if whole else transformers.AutoModel
    module, info = auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True, **LOADING)
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    absent = [key for key in info["missing_keys"] if not key.endswith(UNUSED)] + mismatched
    if not whole:
        if type(module).__name__ not in TOWERS:
            raise ValueError(f"a {type(module).__name__} is no image classifier and no vision tower that is known here")
        if body := sorted(absent):
            raise CheckpointError(f"the weights of 'hf/{name}' are not those of a {type(module).__name__}: {body[0]} is missing")
        module = VisionTower(module, num_classes or 0)
        return module, [f"classifier.{n}" for n, _ in module.classifier.named_parameters()]
    if body := sorted(key for key in absent if "classifier" not in key.split(".")[0]):
        more = f" and {len(body) - 1} more" if len(body) > 1 else ""
        raise CheckpointError(f"the weights of 'hf/{name}' are not those of a {type(module).__name__}: {body[0]}{more} missing")
    if absent and num_classes is None:
        wrap(module, Preprocessing()).reset_classifier(0)
        absent = []
    return module, absent


def _preprocessing(transformers: Any, name: str, config: Any, image_size: int | None) -> Preprocessing:
    """Return the preprocessing of a repository's image processor, or the usual one if it has none."""
    try:
        with quiet_transformers():
            processor = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    except (OSError, ValueError, ImportError):
        processor = {}
    plain = Preprocessing()
    made_for = getattr(config, "image_size", None)
    side = image_size or _side(processor, "crop_size" if processor.get("do_center_crop") else "size") or made_for or plain.image_size
    side = side[0] if isinstance(side, list | tuple) else side
    resized, cropped = _side(processor, "size"), _side(processor, "crop_size")
    crop = cropped / resized if processor.get("do_center_crop") and resized and cropped and cropped <= resized else 1.0
    mean, std = tuple(processor.get("image_mean") or plain.mean), tuple(processor.get("image_std") or plain.std)
    return Preprocessing(side, mean, std, RESAMPLING.get(processor.get("resample"), "bicubic"), crop)


RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filter numbers, which image processors store."""


def _side(processor: dict[str, Any], key: str) -> int | None:
    """Return the shorter side of an image processor's "size" or "crop_size"; None if there is none."""
    value = processor.get(key)
    sides = [value] if isinstance(value, int) else [v for v in value.values() if isinstance(v, int)] if isinstance(value, dict) else []
    return min(sides, default=None)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' reports and progress bars; missing weights raise an error or are marked here."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def is_foreign(name: str) -> bool:
    """Return whether another library builds the model of this name."""
    return name.startswith(("timm/", "hf/"))


def library_of(name: str) -> str:
    """Return the library that builds a model of this name, with its version, such as "timm 1.0.31"; "" for our own."""
    library = {"timm": "timm", "hf": "transformers"}.get(name.partition("/")[0], "")
    return f"{library} {importlib.metadata.version(library)}" if library else ""


def configuration_of(model: Any) -> dict[str, Any]:
    """Return transformers' configuration of a classifier as plain values, for `rebuild_transformers`."""
    return json.loads(model.model.config.to_json_string(use_diff=False))


ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Accepted implementations of attention in a saved configuration; transformers reads any other name as a repository of code."""
NO_SOURCES = ("auto_map", "backbone", "use_pretrained_backbone", "custom_pipelines", "trust_remote_code", *WEIGHT_KEYS)
"""Keys of a configuration that name code or weights elsewhere."""


def check_configuration(config: Any, place: str = "config") -> None:
    """Check that a saved configuration of transformers names no code, weights or models outside itself.

    Raises:
        UsageError: it names the field.
    """
    if isinstance(config, list):
        for i, value in enumerate(config):
            check_configuration(value, f"{place}.{i}")
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        field = f"{place}.{key}"
        if "attn_implementation" in key:
            chosen = list(value.values()) if isinstance(value, dict) else [value]
            if wrong := [one for one in chosen if one not in ATTENTION]:
                raise UsageError(f"{field} must be one of {', '.join(map(str, ATTENTION[1:]))}; got {wrong[0]!r}")
        elif key in NO_SOURCES and value not in (None, False, {}, []) and key != "pretrained_cfg":
            raise UsageError(f"{field} names code or weights outside of the file: {value!r:.80}")
        elif key == "architecture":
            import timm

            if value is not None and not (isinstance(value, str) and timm.is_model(value)):
                raise UsageError(f"{field} must be a model of timm, got {value!r:.80}")
        else:
            check_configuration(value, field)


def rebuild_transformers(config: dict[str, Any]) -> TransformersClassifier:
    """Build the classifier of a saved configuration with fresh weights; nothing is fetched, and only transformers' own code runs.

    Raises:
        MissingExtra: transformers is not installed.
        UsageError: the installed transformers does not support the configuration.
    """
    transformers = require("transformers", "transformers")
    check_configuration(config)
    try:
        model = _build(transformers, transformers.AutoConfig.for_model(**config))
    except Exception as error:  # transformers checks little, and a forged configuration can fail in any way
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"transformers {transformers.__version__} refuses the saved configuration: {first}") from error
    return wrap(model, Preprocessing())
