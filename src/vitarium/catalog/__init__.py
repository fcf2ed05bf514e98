"""What exists: the 103 systems, the model registry, checkpoints and where they come from."""

from vitarium.catalog.create import ModelSpec, create_model, preprocessing_of
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.registry import Family, chain, families, family, find_model, join, list_models, rename
from vitarium.catalog.systems import System, find_system, systems

__all__ = [
    "Family",
    "ModelSpec",
    "Preprocessing",
    "System",
    "chain",
    "create_model",
    "families",
    "family",
    "find_model",
    "find_system",
    "join",
    "list_models",
    "preprocessing_of",
    "rename",
    "systems",
]
