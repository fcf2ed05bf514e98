"""What exists: the 103 systems, the model registry, checkpoints and where they come from."""

from vitarium.catalog.create import ModelSpec, create_model, preprocessing_of
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.registry import Family, families, family, find_model, list_models, rename
from vitarium.catalog.systems import System, find_system, systems

__all__ = [
    "Family",
    "ModelSpec",
    "Preprocessing",
    "System",
    "create_model",
    "families",
    "family",
    "find_model",
    "find_system",
    "list_models",
    "preprocessing_of",
    "rename",
    "systems",
]
