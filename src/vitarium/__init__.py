"""Vitarium: 103 published vision-transformer and diffusion-transformer systems that compose, in one library.

    import vitarium

    model = vitarium.create_model("timm/deit_small_patch16_224", num_classes=10)
    vitarium.apply(model, "evit:keep=0.7")
    vitarium.save(model, "model.safetensors")
    model = vitarium.load("model.safetensors")

Importing the package imports nothing heavy; each name below is looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitarium.version import __version__

if TYPE_CHECKING:
    from vitarium.catalog.applying import apply as apply
    from vitarium.catalog.applying import undo as undo
    from vitarium.catalog.create import create_model as create_model
    from vitarium.catalog.saving import load as load
    from vitarium.catalog.saving import save as save
    from vitarium.catalog.search import list_models as list_models
    from vitarium.catalog.systems import systems as systems
    from vitarium.catalog.timm_registry import register_with_timm as register_with_timm
    from vitarium.data import open_data as open_data
    from vitarium.reports.card import card as card
    from vitarium.verbs.bench import bench as bench
    from vitarium.verbs.claim import claim as claim
    from vitarium.verbs.compare import compare as compare
    from vitarium.verbs.compress import compress as compress
    from vitarium.verbs.evaluate import evaluate as evaluate
    from vitarium.verbs.explain import explain as explain
    from vitarium.verbs.export import export as export
    from vitarium.verbs.find_lr import find_lr as find_lr
    from vitarium.verbs.generate import generate as generate
    from vitarium.verbs.index import index as index
    from vitarium.verbs.info import info as info
    from vitarium.verbs.methods import methods as methods
    from vitarium.verbs.predict import predict as predict
    from vitarium.verbs.probe import probe as probe
    from vitarium.verbs.push import push as push
    from vitarium.verbs.recipes import recipes as recipes
    from vitarium.verbs.restore import restore as restore
    from vitarium.verbs.search import search as search
    from vitarium.verbs.serve import serve as serve
    from vitarium.verbs.train import train as train

VERBS = (
    "bench",
    "claim",
    "compare",
    "compress",
    "evaluate",
    "explain",
    "export",
    "generate",
    "index",
    "info",
    "methods",
    "predict",
    "probe",
    "push",
    "recipes",
    "restore",
    "search",
    "serve",
    "train",
)
"""Functions of `vitarium.verbs`, one per command."""

_FRONT_DOOR = {
    "create_model": "vitarium.catalog.create",
    "list_models": "vitarium.catalog.search",
    "apply": "vitarium.catalog.applying",
    "undo": "vitarium.catalog.applying",
    "save": "vitarium.catalog.saving",
    "load": "vitarium.catalog.saving",
    "systems": "vitarium.catalog.systems",
    "register_with_timm": "vitarium.catalog.timm_registry",
    "open_data": "vitarium.data",
    "card": "vitarium.reports.card",
    "find_lr": "vitarium.verbs.find_lr",
    **{verb: f"vitarium.verbs.{verb}" for verb in VERBS},
}

__all__ = ["__version__", *_FRONT_DOOR]


def __getattr__(name: str) -> Any:
    if name in _FRONT_DOOR:
        return getattr(importlib.import_module(_FRONT_DOOR[name]), name)
    raise AttributeError(f"module 'vitarium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
