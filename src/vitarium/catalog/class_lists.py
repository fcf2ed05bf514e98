"""Class lists that training scripts store beside weights, and the order of a head's rows by them.

torchvision's ImageFolder numbers class folders as text (0, 1, 10, 11, 2), other readers by value (0, 1, 2, 10, 11); only a list in the file
says which. Files of `save` hold the labels in their record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LISTS = ("classes", "class_names", "labels", "label_names", "CLASSES")
"""Keys of a list of names in the order of the numbers."""
NUMBERS = ("class_to_idx", "label2id", "label_to_idx")
"""Keys of a table, name -> number."""
NAMES = ("idx_to_class", "id2label", "idx_to_label")
"""Keys of a table, number -> name."""
INSIDE = ("meta", "hyper_parameters", "hparams", "config", "args", "metadata")
"""Containers in which scripts keep them."""


def class_list_of(content: Any, depth: int = 3) -> list[str] | None:
    """Return the class names in the order of their numbers that a checkpoint holds beside its tensors; None if it holds none.

    Args:
        content: of a torch file, or a safetensors file's metadata, whose values may be JSON.
    """
    content = vars(content) if isinstance(content, argparse.Namespace) else content
    if not isinstance(content, Mapping) or depth == 0:
        return None
    readers: list[tuple[Sequence[str], Callable[[Any], list[str] | None]]] = [(NUMBERS, _by_number), (NAMES, _by_name), (LISTS, _listed)]
    for keys, read in readers:
        for key in keys:
            if key in content and (found := read(_opened(content[key]))):
                return found
    return next((found for key in INSIDE if key in content and (found := class_list_of(_opened(content[key]), depth - 1))), None)


def _opened(value: Any) -> Any:
    """Return the value of JSON text; anything else unchanged."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _by_number(value: Any) -> list[str] | None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return None
    numbers = {name: _number(n) for name, n in value.items()}
    if sorted(n for n in numbers.values() if n is not None) != list(range(len(value))):
        return None
    return sorted(numbers, key=lambda name: numbers[name] or 0)


def _by_name(value: Any) -> list[str] | None:
    if not isinstance(value, Mapping):
        return None
    return _by_number({name: number for number, name in value.items()}) if len(set(map(str, value.values()))) == len(value) else None


def _listed(value: Any) -> list[str] | None:
    whole = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
    return list(value) if whole and len(set(value)) == len(value) else None


def _number(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else None


def order_note(classes: Sequence[str]) -> str:
    """Return a message on weights without class names, whose classes are taken to be in the order of the data's."""
    note = f"the weights name no classes; their {len(classes)} classes are assumed to be the data's, in this order: {_shown(classes)}"
    if (as_text := sorted(classes)) == list(classes):
        return note
    return (
        f"{note}; torchvision's ImageFolder numbers them as text ({_shown(as_text)}): if the weights come from there, the answers are "
        "those of other classes, until class_to_idx is stored beside state_dict in their file"
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
