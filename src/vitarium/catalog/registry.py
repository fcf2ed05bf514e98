"""The model registry: families of variants, registered by a class decorator; a family's module is imported on first use."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitarium.catalog.index import INDEX_COMMAND, entry_of, read_index, room_of
from vitarium.catalog.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitarium.catalog.search import unknown_model
from vitarium.catalog.systems import systems
from vitarium.errors import UsageError

State = dict[str, Tensor]
Renamer = Callable[[State], State]
ModelClass = TypeVar("ModelClass", bound=type[nn.Module])


def rename(*rules: tuple[str, str | None]) -> Renamer:
    """Return a function that renames a checkpoint's tensors by regular expressions.

    Args:
        rules: (pattern, replacement) pairs; the first pattern that matches anywhere in a name applies (`re.sub`). A replacement of None
            drops the tensor (buffers that our model computes). A name that no pattern matches is unchanged.

    Returns:
        state -> renamed state. Raises ValueError if two tensors would get the same name.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def apply(state: State) -> State:
        renamed: State = {}
        for name, tensor in state.items():
            new: str | None = name
            for pattern, replacement in compiled:
                if pattern.search(name):
                    new = None if replacement is None else pattern.sub(replacement, name)
                    break
            if new is None:
                continue
            if new in renamed:
                raise ValueError(f"two tensors would be called {new!r}; the second is {name!r}")
            renamed[new] = tensor
        return renamed

    return apply


def join(new: str, *parts: str) -> Renamer:
    """Return a function that joins tensors along their first axis: join("qkv", "query", "key", "value") makes `*.qkv.weight` of the three.

    `parts` are the parts of a dotted name that differ. Raises KeyError if the first is present and another is missing.
    """

    def apply(state: State) -> State:
        joined = dict(state)
        for name in state:
            before, found, after = name.rpartition(f".{parts[0]}.")
            if found:
                joined[f"{before}.{new}.{after}"] = torch.cat([joined.pop(f"{before}.{part}.{after}") for part in parts])
        return joined

    return apply


def part_of(prefix: str) -> Renamer:
    """Return a function that keeps the tensors below a prefix, such as "backbone." in a detector's file, without it; all if none has it."""

    def apply(state: State) -> State:
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)} or dict(state)

    return apply


def chain(*renamers: Renamer) -> Renamer:
    """Return a function that applies renamers in order."""

    def apply(state: State) -> State:
        for renamer in renamers:
            state = renamer(state)
        return state

    return apply


@dataclass(frozen=True)
class Family:
    """One architecture with its variants. Created by the decorator `family`."""

    name: str
    slug: str
    cls: type[nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    dialects: Mapping[str, Renamer] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    learner: str = "classification"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    @property
    def room(self) -> str:
        """Folder of its system, such as "backbones" or "efficiency/tokens"."""
        return room_of(self.slug, self.cls.__module__)

    def model_names(self) -> list[str]:
        """Return the full names of its models, such as "swin_tiny"."""
        return [f"{self.name}_{variant}" for variant in self.variants]

    def arguments(self, variant: str) -> dict[str, Any]:
        """Return the constructor's arguments of a variant."""
        takes = inspect.signature(self.cls).parameters
        return {k: v for k, v in self.variants[variant].items() if k not in INPUT_KEYS or k in takes}

    def preprocessing(
        self, variant: str, *, image_size: int | None = None, in_chans: int = 3, frames: int | None = None, stride: int | None = None
    ) -> Preprocessing:
        """Return the authors' preprocessing of an image or clip for this variant (for `pico`: the demo's)."""
        row = self.variants[variant]
        size = image_size or row.get("image_size", 224)
        mean, std = (self.mean, self.std) if in_chans == 3 else ((0.5,), (0.5,))
        crop = 1.0 if size < 128 else self.crop_pct  # small images are not cropped
        return Preprocessing(size, mean, std, self.interpolation, crop, frames or row.get("frames"), stride or row.get("stride"))


INPUT_KEYS = ("image_size", "frames", "stride")
"""Keys of a variant that describe its input; a constructor gets those that it accepts."""

_FAMILIES: dict[str, Family] = {}


def family(
    slug: str,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    official: Renamer | None = None,
    name: str | None = None,
    dialects: Mapping[str, Renamer] | None = None,
    weights: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
    learner: str = "classification",
    **preparation: Any,
) -> Callable[[ModelClass], ModelClass]:
    """Register a model class with its variants.

    Args:
        slug: the system, as in systems.toml, which is also the name of its file; or the name of a base that several systems use.
        variants: name of a variant -> the constructor's arguments. The key `image_size` is the native side in pixels (default 224),
            `frames` and `stride` define the clip of a video model; they are passed on only to constructors that accept them.
        official: renames the authors' checkpoint to our names.
        name: prefix of the models' names if it is not the slug ("swin_mlp" in swin.py); it must begin with the slug.
        dialects: further renamers by the codebase of the files: "timm", "torchvision", "transformers".
        weights: variant -> tag -> sources of the weights, in order of preference: "timm:NAME.TAG" (looked up in timm's own registry),
            "hf:OWNER/NAME[/FILE]", or the authors' release address. `pretrained=True` selects the first tag.
        learner: name of the learner that evaluates its models, if it is not classification.
        preparation: mean, std, interpolation, crop_pct if they differ from the usual ones of ImageNet.

    A class without a method `example_inputs` gets the one of models that take one image or clip (`vitarium.catalog.calling.image_inputs`).
    """
    name = name or slug
    if not name.startswith(slug) and any(system.slug == slug for system in systems()):
        raise ValueError(f"the family {name!r} must begin with its slug {slug!r}, so that its file can be found by name")

    def register(cls: ModelClass) -> ModelClass:
        if not hasattr(cls, "example_inputs"):
            from vitarium.catalog.calling import image_inputs

            cls.example_inputs = image_inputs  # type: ignore[attr-defined]
        named = ({"official": official} if official else {}) | dict(dialects or {})
        _FAMILIES[name] = Family(name, slug, cls, variants, named, weights or {}, learner, **preparation)
        return cls

    return register


def registered_families() -> list[Family]:
    """Return the families that were registered in this process so far."""
    return list(_FAMILIES.values())


def system_module(slug: str) -> str | None:
    """Return the dotted name of a system's module, or None if it is not implemented yet.

    Raises:
        UsageError: the module exists and the index lacks it.
    """
    entry = entry_of(slug)
    return entry.module if entry else None


def import_system(slug: str) -> bool:
    """Import the module of a system, which registers its contents. Return False if it is not implemented yet."""
    name = system_module(slug)
    if name is None:
        return False
    importlib.import_module(name)
    return True


def families(slug: str | None = None) -> list[Family]:
    """Return the families of one system or base, or of all. Imports their modules."""
    for indexed in read_index().families():
        if slug in (None, indexed.slug):
            importlib.import_module(indexed.module)
    return [f for f in _FAMILIES.values() if slug in (None, f.slug)]


def find_model(name: str) -> tuple[Family, str]:
    """Return the family and the variant of a full model name. Imports only the file of the family.

    Raises:
        UsageError: there is none; the message names similar ones.
    """
    if found := _find_registered(name):
        return found
    indexed = read_index().models.get(name)
    if indexed is not None:
        importlib.import_module(indexed[0].module)
        if found := _find_registered(name):
            return found
        raise UsageError(f"the index has a model {name!r} that {indexed[0].module} no longer registers; update it with: {INDEX_COMMAND}")
    raise unknown_model(name)


def _find_registered(name: str) -> tuple[Family, str] | None:
    for f in sorted(_FAMILIES.values(), key=lambda f: -len(f.name)):
        if name.startswith(f.name + "_") and name[len(f.name) + 1 :] in f.variants:
            return f, name[len(f.name) + 1 :]
    return None
