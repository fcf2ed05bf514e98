"""Folder of a comparison: it records what was asked, so that the same comparison continues there and another one is refused."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitarium.data import ImageData
from vitarium.errors import UsageError
from vitarium.files import write_json
from vitarium.training import Recipe
from vitarium.training.identity import check_same_run, fingerprint, fingerprint_like
from vitarium.version import __version__

PLAN, ERROR = "comparison.json", "error.txt"
OPTIONS = {
    "models": "--models",
    "pretrained": "--pretrained",
    "runtime": "--runtime",
    "processes": "--devices",
    "recipe.seed": "--seed",
    "recipe.batch_size": "--batch-size",
    "recipe.image_size": "--image-size",
    "recipe.budget.steps": "--steps",
    "recipe.budget.epochs": "--epochs",
    "recipe.budget.minutes": "--minutes",
}
"""Keys of `plan_of` -> the option of `vitarium compare` that sets them."""


def plan_of(
    images: ImageData, names: Sequence[str], recipe: Recipe, pretrained: bool, *, processes: int, runtime: str = "eager"
) -> dict[str, Any]:
    """Return everything that decides the outcome as plain values; two comparisons are the same if these are equal."""
    return {
        "vitarium": __version__,
        "data": fingerprint(images),
        "models": ", ".join(names),
        "recipe": recipe.identity(),
        "model_arguments": recipe.model_arguments,
        "pretrained": pretrained,
        "processes": processes,
        **({} if runtime == "eager" else {"runtime": runtime}),
    }


def default_folder(root: Path, images: ImageData, plan: dict[str, Any]) -> Path:
    """Return the newest folder of this very comparison, else a new one: runs/digits-2026-01-31, then -2, -3 ..."""
    found = [path for path in root.glob(f"*/{PLAN}") if (there := read_json(path)) is not None and there == _like(there, plan, images)]
    if found:
        return max(found, key=lambda path: path.stat().st_mtime_ns).parent
    name = f"{slug(images.name)}-{datetime.date.today()}"
    candidates = (root / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in candidates if not folder.exists())


def _like(there: Any, plan: dict[str, Any], images: ImageData) -> dict[str, Any]:
    """Return a plan with the fingerprint of its data in the form of a recorded plan."""
    recorded = there.get("data") if isinstance(there, dict) else None
    return {**plan, "data": fingerprint_like(recorded, images)} if isinstance(recorded, dict) else plan


def claim(folder: Path, plan: dict[str, Any], images: ImageData) -> None:
    """Record a comparison in its folder, or check that the folder records the same one, or one of fewer models with the same settings.
    One that has trained nothing is replaced.

    Raises:
        UsageError: it holds another comparison (the message names the differences), or other files.
    """
    there = read_json(folder / PLAN)
    if there is not None and _has_trained(folder):
        here = _like(there, plan, images)
        check_same_run(folder, {**there, "models": here["models"]} if _adds_models(there, here) else there, here, OPTIONS)
        return None if here == there else write_json(folder / PLAN, here)
    for path in folder.glob(f"models/*/{ERROR}"):  # of a comparison that failed before its first step
        path.unlink()
    if there is None and any(not path.name.startswith(".lock") and not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise UsageError(f"{folder} holds other files and no comparison; choose a new or empty folder")
    write_json(folder / PLAN, plan)


def _adds_models(there: Any, here: dict[str, Any]) -> bool:
    """Return whether a plan has all models of a recorded one, and further ones."""
    if not isinstance(there, dict):
        return False
    recorded, wanted = (set(str(plan.get("models", "")).split(", ")) for plan in (there, here))
    return recorded < wanted


def _has_trained(folder: Path) -> bool:
    """Return whether a model of a comparison has left anything but locks and an error."""
    kept = lambda name: not name.startswith(".lock") and not name.endswith(".tmp") and name != ERROR
    return any(kept(path.name) for path in folder.glob("models/*/*"))


def read_json(path: Path) -> Any:
    """Return the content, or None where there is no such file or no JSON in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def slug(name: str) -> str:
    """Return a name that is safe for a file: "timm/vit_pico" -> "timm-vit_pico"."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"
