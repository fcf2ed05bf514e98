"""Answers of classifiers as plain values, and their form in tables and files. Imports no torch.

The tasks `classify` and `multilabel` have these answers, whether PyTorch or another runtime executes the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Answer = dict[str, Any]
NOT_FINITE = {"error": "the model's output is not finite"}


def class_names(labels: list[str] | None, count: int) -> list[str]:
    """Return the labels of a model, or "class 0", "class 1", ... if it has none."""
    return list(labels or [f"class {i}" for i in range(count)])


def ranked(logits: np.ndarray, names: list[str], limit: int, temperature: float | None = None) -> Answer:
    """Return {"predictions": [{"label", "probability"}, ...]} of exclusive classes, the most probable first.

    Args:
        logits: (num_classes,) float32; an answer {"error"} where they are not finite.
        names: of the classes.
        limit: number of classes.
        temperature: by which the logits are divided (see `vitarium.catalog.calibration`).
    """
    import numpy as np

    if not np.isfinite(logits).all():
        return dict(NOT_FINITE)
    scaled = logits / np.float32(temperature or 1)
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    first = np.argsort(-logits, kind="stable")[:limit]
    return {"predictions": [{"label": names[c], "probability": float(shares[c])} for c in first]}


def decided(logits: np.ndarray, names: list[str], limit: int, temperature: float | None = None) -> Answer:
    """Return the probability of each of independent labels, the most probable first.

    Args:
        logits: (num_classes,) float32; an answer {"error"} where they are not finite.
        names: of the labels.
        limit, temperature: not used; all labels are returned.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        return dict(NOT_FINITE)
    with np.errstate(over="ignore"):
        shares = 1 / (1 + np.exp(-logits))
    return dict(sorted(zip(names, shares.tolist(), strict=True), key=lambda pair: -pair[1]))


def ranked_cells(answer: Answer) -> dict[str, str]:
    """Return the columns of `ranked` for a table on the terminal."""
    first, *others = answer["predictions"]
    then = ", ".join(f"{p['label']} {100 * p['probability']:.1f} %" for p in others)
    return {"label": first["label"], "probability": f"{100 * first['probability']:.1f} %", "then": then}


def ranked_flat(answer: Answer) -> dict[str, Any]:
    """Return the columns of `ranked` for a CSV file."""
    pairs = enumerate(answer["predictions"], 1)
    return {f"{kind}_{i}": p[kind] if kind == "label" else f"{p[kind]:.6f}" for i, p in pairs for kind in ("label", "probability")}


def plain_cells(answer: Answer) -> dict[str, str]:
    """Return the columns of any answer for a table on the terminal: one, with all its values."""
    said = ", ".join(f"{name} {_short(value)}" for name, value in answer.items() if not name.startswith("_"))
    return {"answer": said}


def plain_flat(answer: Answer) -> dict[str, Any]:
    """Return the columns of any answer for a CSV file: scalars by name; nested values as JSON."""
    plain = {name: value for name, value in answer.items() if not name.startswith("_")}
    return {name: v if isinstance(v, str | int | float | bool) else json.dumps(v) for name, v in plain.items()}


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else text[:117] + "..."


@dataclass(frozen=True)
class Form:
    """The answers of a task without the task.

    Attributes:
        name: of the task.
        answer: function of (logits, names, limit, temperature) for one image.
        cells, flat: see `vitarium.training.tasks.Task`.
    """

    name: str
    answer: Callable[..., Answer]
    cells: Callable[[Answer], dict[str, str]]
    flat: Callable[[Answer], dict[str, Any]]


FORMS = {
    "classify": Form("classify", ranked, ranked_cells, ranked_flat),
    "multilabel": Form("multilabel", decided, plain_cells, plain_flat),
}
"""Tasks whose answers follow from the model's output and labels."""
