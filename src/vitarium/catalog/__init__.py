"""The catalog: the 103 systems, the index, the model registry, checkpoints and their sources.

Importing this package imports nothing heavy; models and checkpoints are looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitarium.catalog.systems import System as System
from vitarium.catalog.systems import find_system as find_system
from vitarium.catalog.systems import systems as systems

if TYPE_CHECKING:
    from vitarium.catalog.create import ModelSpec as ModelSpec
    from vitarium.catalog.create import create_model as create_model
    from vitarium.catalog.create import preprocessing_of as preprocessing_of
    from vitarium.catalog.preprocessing import Preprocessing as Preprocessing
    from vitarium.catalog.registry import Family as Family
    from vitarium.catalog.registry import chain as chain
    from vitarium.catalog.registry import families as families
    from vitarium.catalog.registry import family as family
    from vitarium.catalog.registry import find_model as find_model
    from vitarium.catalog.registry import join as join
    from vitarium.catalog.registry import part_of as part_of
    from vitarium.catalog.registry import rename as rename
    from vitarium.catalog.search import list_models as list_models

_PLACES = {
    "Family": "registry",
    "ModelSpec": "create",
    "Preprocessing": "preprocessing",
    "chain": "registry",
    "create_model": "create",
    "families": "registry",
    "family": "registry",
    "find_model": "registry",
    "join": "registry",
    "list_models": "search",
    "part_of": "registry",
    "preprocessing_of": "create",
    "rename": "registry",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"vitarium.catalog.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'vitarium.catalog' has no attribute {name!r}")
