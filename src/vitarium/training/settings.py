"""Reading of settings from YAML without executable content, with errors that name the key, the accepted values and near names."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitarium.assignments import parse_assignment
from vitarium.errors import UsageError, nearest
from vitarium.plain_yaml import MAX_BYTES, parse_yaml

Model = TypeVar("Model", bound=BaseModel)

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of settings: frozen, without unknown keys, infinities or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def read_settings(path: str | Path) -> Any:
    """Return the values of a YAML file.

    Raises:
        UsageError: it cannot be read, is too large or is not plain YAML.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes; settings have at most {MAX_BYTES:,}")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def check(model: type[Model], values: Any, source: str) -> Model:
    """Convert values to a checked settings object.

    Raises:
        UsageError: up to five problems, each with the path to its key, the accepted values and near names.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{source} must be a table of settings ({', '.join(model.model_fields)}), got {_short(values)}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(model, e) for e in error.errors(include_url=False)))
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(f"{source}: " + "\n  ".join(problems[:5]) + more) from error
    except RecursionError as error:
        raise UsageError(f"{source}: nested too deeply") from error


def _problem(model: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "settings"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument", "missing"):
        keys = keys_at(model, path[:-1])
        if error["type"] == "missing":
            return f"{name} is missing"
        inside = [f"{key}.{path[-1]}" for key in keys if path[-1] in keys_at(model, [*path[:-1], key]) and key != path[-1]]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else nearest(path[-1], keys)
        return f"{name} is not a setting{hint} (accepted: {', '.join(keys) or 'none'})"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name}: {message}, got {_short(error['input'])}"


def keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the keys that the section at a path accepts; for an empty path those of `model`."""
    parts = iter(path)
    for part in parts:
        field = model.model_fields.get(part)
        sections = _sections(field.annotation) if field else []
        if not sections:
            break
        model = sections[0]
        if field and typing.get_origin(field.annotation) in (dict, list, tuple):
            next(parts, None)  # the entry's key or number
    fields: dict[str, Any] = getattr(model, "model_fields", None) or getattr(model, "__pydantic_fields__", {})
    return [getattr(field, "alias", None) or name for name, field in fields.items()]


def _sections(annotation: Any) -> list[Any]:
    """Return the settings classes inside an annotation such as `Ema | None`."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or hasattr(annotation, "__dataclass_fields__")):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, dict, list, tuple):
        return [section for part in typing.get_args(annotation) for section in _sections(part)]
    return []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return a copy of nested settings with `PATH=VALUE` assignments applied, such as "optimizer.lr=1e-4"; values are read as YAML.

    Raises:
        UsageError: an assignment of another form.
    """
    result = dict(values)
    for assignment in assignments:
        path, value = parse_assignment(assignment, "an override has the form KEY=VALUE, such as optimizer.lr=1e-4")
        keys = path.split(".")
        here = result
        for key in keys[:-1]:
            inner = here.get(key)
            here[key] = dict(inner) if isinstance(inner, dict) else {}
            here = here[key]
        here[keys[-1]] = value
    return result


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested settings in which `changes` replaces single keys; a section that was None becomes that of `changes`."""
    result = dict(values)
    for key, value in changes.items():
        here = result.get(key)
        result[key] = merged(here, value) if isinstance(here, dict) and isinstance(value, dict) else value
    return result
