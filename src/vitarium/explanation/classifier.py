"""Description of a classifier as plain values, from which it is rebuilt; it is saved with the classifier's explainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from vitarium.catalog.applying import methods_on
from vitarium.catalog.create import ModelSpec, create_model
from vitarium.catalog.foreign import configuration_of
from vitarium.catalog.from_record import build
from vitarium.catalog.record import ModelRecord, problems
from vitarium.errors import UsageError

KEYS = ("name", "arguments", "preprocessing", "labels", "methods", "config")


def describe_classifier(model: nn.Module) -> dict[str, Any]:
    """Return what `rebuild_classifier` needs: name, arguments, preprocessing, labels, applied methods, and transformers' configuration.

    Raises:
        UsageError: the model was not made by `create_model` or `load`.
    """
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise UsageError(f"a {type(model).__name__} that create_model did not make cannot be described, so its explainer cannot be saved")
    classes = {"num_classes": model.num_classes} if isinstance(getattr(model, "num_classes", None), int) else {}
    preprocessing, labels = getattr(model, "preprocessing", None), getattr(model, "labels", None)
    values: dict[str, Any] = {
        "name": spec.name,
        "arguments": {**spec.arguments, **classes},
        "preprocessing": preprocessing and {k: list(v) if isinstance(v, tuple) else v for k, v in preprocessing.to_dict().items()},
        "labels": labels and [str(label) for label in labels],
        "methods": [report.saved() for report in methods_on(model)],
        "config": configuration_of(model) if spec.name.startswith("hf/") else None,
    }
    return {key: value for key, value in values.items() if value}


def rebuild_classifier(values: Mapping[str, Any] | str, **arguments: Any) -> nn.Module:
    """Create a classifier with fresh weights, from a name or from the result of `describe_classifier`.

    Args:
        values: a model's name, or the description.
        arguments: num_classes, image_size; they override the description's.

    Raises:
        UsageError: unknown model, or a description with other keys.
    """
    if isinstance(values, str):
        return create_model(values, **arguments)
    try:
        record = ModelRecord.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(f"a classifier is described by {', '.join(KEYS)} (name at least): {'; '.join(problems(error))}") from error
    return build(record.model_copy(update=dict(arguments={**record.arguments, **arguments})))
