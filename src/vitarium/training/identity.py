"""The identity of a run: recipe, data, model and number of processes; and in words what differs between two.

Data are identified by their images' names relative to the folder that holds them all, so that a run resumes wherever the folder lies, from
whichever working folder, and however its path is spelled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vitarium.errors import UsageError
from vitarium.texts import printable
from vitarium.training.recipe import EARLIER_KEYS
from vitarium.training.settings import check

NAMES = 1000
"""Largest number of names of each part from which its digest is computed."""

WORDS = {
    "data.classes": "number of classes",
    "data.class_names": "names of the classes",
    "data.name": "name of the data",
    "data.train.images": "training images",
    "data.val.images": "held-out images",
    "data.train.pictures": "training images",  # in runs of version 0.1.0
    "data.val.pictures": "held-out images",
    "data.train.targets": "labels of the training images",
    "data.val.targets": "labels of the held-out images",
    "data.train.files": "names of the training images",
    "data.val.files": "names of the held-out images",
    "data.train.first": "first training image",
    "data.val.first": "first held-out image",
    "model.tensors": "shapes of the model's tensors (model.tensors)",
    "processes": "processes",
    "vitarium": "version of vitarium",
}
"""Keys of identities whose values, or whose names, are not readable -> their names in messages."""

OPTIONS = {
    "recipe.batch_size": "--batch-size",
    "recipe.image_size": "--image-size",
    "recipe.budget.steps": "--steps",
    "recipe.budget.epochs": "--epochs",
    "recipe.optimizer.lr": "--lr",
    "processes": "--devices",
}
"""Keys of the identity of a run of `vitarium train` -> the option that sets them."""

DIGESTS = frozenset(["data.class_names", "data.train.targets", "data.val.targets", "data.train.files", "data.val.files", "model.tensors"])


def identity_of(recipe: Any, data: Any, learner: nn.Module, processes: int) -> dict[str, Any]:
    """Return the values that a run and a checkpoint must have in common for resuming: recipe, data, model, number of processes."""
    model = getattr(learner, "model", learner)
    spec = getattr(model, "spec", None)
    shapes = [(name, list(tensor.shape)) for name, tensor in learner.state_dict().items()]
    numbers = recipe.identity()
    return {
        "recipe": {**numbers, "objective": whole_objective(numbers["objective"], learner)},
        "data": fingerprint(data),
        "model": {
            "learner": type(learner).__name__,
            "name": spec.name if spec else type(model).__name__,
            "arguments": json.loads(json.dumps(spec.arguments if spec else {}, default=str)),
            "tensors": _digest(shapes),
        },
        "processes": processes,
    }


def whole_objective(objective: dict[str, Any], learner: nn.Module) -> dict[str, Any]:
    """Return an objective of a recipe with all of its settings, including those at their defaults, as plain values."""
    settings = getattr(learner, "Settings", None)
    if settings is None:
        return objective
    read = {k: v for k, v in objective.items() if k != "name" and (k in settings.model_fields or k not in EARLIER_KEYS)}
    try:
        return {"name": objective["name"], **check(settings, read, "the objective").model_dump(mode="json")}
    except UsageError:
        return objective  # differs from all others; the error lists the differences


def fingerprint(data: Any) -> dict[str, Any]:
    """Return the sizes and classes of a data set, and digests of the targets and of up to a thousand sample names of each part.

    The name of the data is not in it, and names that are paths are relative to the folder that holds all of them: neither depends on where
    the data lie.
    """
    described: dict[str, Any] = {"classes": len(data.classes), "class_names": _digest(list(data.classes))}
    names = {part: _names(images) for part, images in _parts(data)}
    root = _common_folder([name for some in names.values() for name in some])
    for part, images in _parts(data):
        inside = [os.path.relpath(name, root).replace(os.sep, "/") if root else name for name in names[part]]
        first = {"first": printable(inside[0], "")} if inside else {}
        described[part] = {"images": len(images), "targets": _targets(images), "files": _digest(inside), **first}
    return described


def earlier_fingerprint(data: Any) -> dict[str, Any]:
    """Return the fingerprint of version 0.1.0, which has the name of the data and the paths as they were spelled."""
    described: dict[str, Any] = {"name": str(data.name), "classes": len(data.classes), "class_names": _digest(list(data.classes))}
    for part, images in _parts(data):
        described[part] = {"pictures": len(images), "targets": _targets(images), "files": _digest(_names(images))}
    return described


def fingerprint_like(recorded: dict[str, Any], data: Any) -> dict[str, Any]:
    """Return the fingerprint of data in the form of a recorded one, for their comparison."""
    return earlier_fingerprint(data) if "name" in recorded else fingerprint(data)


def _parts(data: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("train", data.train), ("val", data.val)


def _names(images: Any) -> list[str]:
    count = len(images)
    return [str(images.describe(i)) for i in range(0, count, max(1, count // NAMES))] if hasattr(images, "describe") else []


def _targets(images: Any) -> str:
    return _digest([t if isinstance(t, int) else str(t) for t in getattr(images, "targets", [])])


def _common_folder(names: list[str]) -> str:
    """Return the folder that holds all names; "" for names that are no paths, or of which not all are below one folder."""
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    except ValueError:  # absolute and relative ones, or several drives
        return ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_same_run(folder: Path, there: dict[str, Any], here: dict[str, Any], options: Mapping[str, str] = OPTIONS) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        folder: of the run.
        there, here: identities.
        options: keys of identities -> the command line option that sets them.

    Raises:
        UsageError: it is another run's; the message lists the differences.
    """
    if differences := in_words(there, here, options):
        raise UsageError(f"{folder} holds another run; choose another folder (--out). They differ in {differences}")


def in_words(there: dict[str, Any], here: dict[str, Any], options: Mapping[str, str] = OPTIONS) -> str:
    """Return the first five differences between two identities in words; "" for none."""
    found = _differences("", there, here)
    names = {name for name, _, _ in found}
    found = [row for row in found if row[0].replace(".files", ".first") not in names or not row[0].endswith(".files")]  # a name says more
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return "; ".join(_in_words(*row) + (f" ({options[row[0]]})" if row[0] in options else "") for row in found[:5]) + more


def _in_words(name: str, there: Any, here: Any) -> str:
    word = WORDS.get(name, name)
    return word if name in DIGESTS else f"{word}: {there} there, {here} now"


def _differences(prefix: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for key in keys for d in _differences(f"{prefix}.{key}" if prefix else str(key), a.get(key), b.get(key))]
    return [] if a == b else [(prefix, a, b)]
