"""Which models exist: families of variants, registered by a decorator above the class, imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitarium.catalog.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitarium.catalog.systems import find_system, systems
from vitarium.errors import UsageError, nearest

State = dict[str, Tensor]
Renamer = Callable[[State], State]
ModelClass = TypeVar("ModelClass", bound=type[nn.Module])


def rename(*rules: tuple[str, str | None]) -> Renamer:
    """A function that renames a checkpoint's tensors by regular expressions.

    Args:
        rules: (pattern, replacement) pairs; the first pattern that is found in a name decides (`re.sub`). A replacement of None drops
            the tensor (buffers that ours computes). A name that no pattern finds stays as it is.

    Returns:
        state -> renamed state. Raises ValueError where two tensors would get one name.
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
    """A function that joins tensors along their first axis: join("qkv", "query", "key", "value") makes `*.qkv.weight` of the three.

    `parts` are the parts of a dotted name that differ. Raises KeyError where one of them is missing beside the first.
    """

    def apply(state: State) -> State:
        joined = dict(state)
        for name in state:
            before, found, after = name.rpartition(f".{parts[0]}.")
            if found:
                joined[f"{before}.{new}.{after}"] = torch.cat([joined.pop(f"{before}.{part}.{after}") for part in parts])
        return joined

    return apply


def chain(*renamers: Renamer) -> Renamer:
    """Renamers one after the other."""

    def apply(state: State) -> State:
        for renamer in renamers:
            state = renamer(state)
        return state

    return apply


@dataclass(frozen=True)
class Family:
    """One architecture with its variants. Made by the decorator `family`."""

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
        """Where its system lives, such as "backbones" or "efficiency/tokens"."""
        return "/".join(BASES[self.slug].split(".")[1:2]) if self.slug in BASES else find_system(self.slug).room

    def model_names(self) -> list[str]:
        """Full names, such as "swin_tiny"."""
        return [f"{self.name}_{variant}" for variant in self.variants]

    def arguments(self, variant: str) -> dict[str, Any]:
        """The constructor's arguments of a variant."""
        takes = inspect.signature(self.cls).parameters
        return {k: v for k, v in self.variants[variant].items() if k not in INPUT_KEYS or k in takes}

    def preprocessing(
        self, variant: str, *, image_size: int | None = None, in_chans: int = 3, frames: int | None = None, stride: int | None = None
    ) -> Preprocessing:
        """How the authors (or, for `pico`, the demo) prepare an image or a clip for this variant."""
        row = self.variants[variant]
        size = image_size or row.get("image_size", 224)
        mean, std = (self.mean, self.std) if in_chans == 3 else ((0.5,), (0.5,))
        crop = 1.0 if size < 128 else self.crop_pct  # small pictures have no border to spare
        return Preprocessing(size, mean, std, self.interpolation, crop, frames or row.get("frames"), stride or row.get("stride"))


INPUT_KEYS = ("image_size", "frames", "stride")
"""Keys of a variant that describe its input; a constructor gets those that it takes."""

BASES = {
    "dcgan": "vitarium.generation.adversarial.dcgan",
    "dit": "vitarium.generation.diffusion",
    "sit_flow": "vitarium.generation.diffusion",
}
"""Families that are no system's own, which several systems build on -> their module. ("sit" is another paper's slug.)"""

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
        slug: the system, as in systems.toml, or a row of `BASES`; also the name of the file that the class is in.
        variants: name of a variant -> the constructor's arguments. The key `image_size` is the side that the variant was made for, in
            pixels (default 224), `frames` and `stride` the clip of a video model; they are passed on only to a constructor that takes them.
        official: renames the authors' checkpoint to our names.
        name: prefix of the models' names where it is not the slug ("swin_mlp" in swin.py); it must begin with the slug.
        dialects: further renamers by the code that wrote such files: "timm", "torchvision", "transformers".
        weights: variant -> tag -> where such weights lie, first choice first: "timm:NAME.TAG" (looked up in timm's own registry),
            "hf:OWNER/NAME[/FILE]", or the authors' release address. The first tag is what `pretrained=True` means.
        learner: name of the objective by which its models are evaluated, where it is not classification.
        preparation: mean, std, interpolation, crop_pct where they are not ImageNet's usual ones.

    A class without a method `example_inputs` gets the one of models that take one image or clip (`vitarium.catalog.calling.image_inputs`).
    """
    name = name or slug
    if not name.startswith(slug) and name not in BASES:
        raise ValueError(f"the family {name!r} must begin with its slug {slug!r}, so that its file is found by name")

    def register(cls: ModelClass) -> ModelClass:
        if not hasattr(cls, "example_inputs"):
            from vitarium.catalog.calling import image_inputs

            cls.example_inputs = image_inputs  # type: ignore[attr-defined]
        named = ({"official": official} if official else {}) | dict(dialects or {})
        _FAMILIES[name] = Family(name, slug, cls, variants, named, weights or {}, learner, **preparation)
        return cls

    return register


def system_module(slug: str) -> str | None:
    """Dotted name of the module of a system, or None where it is not written yet."""
    system = find_system(slug)
    name = f"vitarium.{system.room.replace('/', '.')}.{slug}"
    try:
        return name if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:  # the room itself is not there yet
        return None


def import_system(slug: str) -> bool:
    """Import the module of a system, so that what it registers is known. False where it is not written yet."""
    name = system_module(slug)
    if name is None:
        return False
    importlib.import_module(name)
    return True


def families(slug: str | None = None) -> list[Family]:
    """The registered families, of one system or of all."""
    for base, module in BASES.items():
        if slug in (None, base):
            importlib.import_module(module)
    for system in systems():
        if slug in (None, system.slug):
            import_system(system.slug)
    return [f for f in _FAMILIES.values() if slug in (None, f.slug)]


def list_models(pattern: str = "*") -> list[str]:
    """Names of our models that match a shell pattern, such as "*_pico"; family by family, in the order of the variants tables."""
    import fnmatch

    return [name for f in families() for name in f.model_names() if fnmatch.fnmatch(name, pattern)]


def find_model(name: str) -> tuple[Family, str]:
    """The family and the variant of a full model name. Imports only the file that the name points to.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    for base, module in BASES.items():
        if name.startswith(base + "_"):
            importlib.import_module(module)
    for system in sorted(systems(), key=lambda s: -len(s.slug)):  # "crossformer" before "cross"
        if name.startswith(system.slug + "_"):
            import_system(system.slug)
    for f in sorted(_FAMILIES.values(), key=lambda f: -len(f.name)):
        if name.startswith(f.name + "_") and name[len(f.name) + 1 :] in f.variants:
            return f, name[len(f.name) + 1 :]
    hint = nearest(name, list_models())
    raise UsageError(f"unknown model {name!r}{hint} ('vitarium models' lists all; 'timm/NAME' and 'hf/OWNER/NAME' reach others)")
