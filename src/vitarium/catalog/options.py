"""Options of methods: dataclasses with fields checked by pydantic.

@method("evit", kind="reduce")
@validated
class EViT(Reducer):
    keep: Share = 0.7
    score: Literal["class", "mean"] = "class"

EViT(keep=2)    # UsageError: evit: keep must be a number above 0 and up to 1, got 2
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import annotated_types
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from vitarium.errors import UsageError, VitariumError, nearest

T = TypeVar("T")

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""Strict checking: no text or bool for a number, no NaN, no unknown options."""

# ---- field types

Share = Annotated[float, Field(gt=0, le=1)]
"""A share above 0; 1 is everything."""
Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
"""Indices or counts from 0."""


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(strict=False)]
"""Shell patterns of names; a single string is one pattern."""


# ---- checking


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def validated(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are checked against their annotations on construction, before `__post_init__`.

    A value or a name that is not accepted raises UsageError with the value, the accepted values and the nearest name.
    """
    checked: Any = dataclass(cls, frozen=True, config=CONFIG)
    construct = checked.__init__

    @functools.wraps(construct)
    def construct_checked(self: Any, *args: Any, **options: Any) -> None:
        try:
            construct(self, *args, **options)
        except ValidationError as error:
            names = [f.name for f in dataclasses.fields(checked)]
            raise _refusal(checked, error, {**dict(zip(names, args, strict=False)), **options}) from error

    checked.__init__ = construct_checked
    return checked


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError for unknown options.

    Raises:
        UsageError: with the nearest names.
    """
    known = list(known)
    if wrong := [name for name in given if name not in known]:
        raise UsageError(f"{owner} has no option {wrong[0]!r}{nearest(wrong[0], known)} (it has {', '.join(known) or 'none'})")


def _refusal(cls: Any, error: ValidationError, given: Mapping[str, Any]) -> VitariumError:
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__
    owner = getattr(cls, "slug", cls.__name__)
    problems: dict[str, str] = {}
    for row in error.errors(include_url=False):
        cause = row.get("ctx", {}).get("error")
        if not row["loc"]:  # raised by __post_init__
            if isinstance(cause, VitariumError):
                return cause
            problems.setdefault("", f"{owner}: {cause or row['msg']}")
            continue
        name = str(row["loc"][0])
        if name not in fields:
            try:
                check_names(owner, [name], fields)
            except UsageError as unknown:
                return unknown
            problems.setdefault(name, f"{owner}: {row['msg']}, got {row['input']!r}")
        elif row["type"] == "missing":
            problems.setdefault(name, f"{owner}: {name} is missing")
        else:
            value = given.get(name, row["input"])
            wanted = str(cause) if cause else f"must be {describe(fields[name].annotation, fields[name].metadata)}"
            hint = nearest(value, choices(fields[name].annotation)) if isinstance(value, str) else ""
            problems.setdefault(name, f"{owner}: {name} {wanted}, got {value!r}{hint}")
    return UsageError("\n  ".join(problems.values()))


# ---- descriptions of annotations


def describe(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """Describe the values that an annotation accepts, such as "a whole number from 3 to 8" or "'class' or 'mean'"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    constraints = [c for one in constraints for c in (one.metadata if isinstance(one, FieldInfo) else [one])]
    if origin is Annotated:
        return describe(args[0], [*args[1:], *constraints])
    if origin in (typing.Union, types.UnionType):
        return _listed([describe(arg, constraints) for arg in args])
    if origin is Literal:
        return _listed([repr(arg) for arg in args])
    if origin is tuple:
        items = [describe(arg) for arg in args if arg is not ...]
        return f"a list with {items[0]} each" if len(items) == 1 and ... in args else f"[{'; '.join(items)}]"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null", None: "null"}
    if annotation in (int, float):
        return plain[annotation] + _range(constraints)
    return plain.get(annotation) or ("a table" if origin else str(getattr(annotation, "__name__", annotation)))


def choices(annotation: Any) -> list[str]:
    """Return the strings that the literals of an annotation accept."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return [arg for arg in args if isinstance(arg, str)]
    return [choice for arg in args for choice in choices(arg)]


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} or {items[-1]}"


def _range(constraints: Iterable[Any]) -> str:
    bounds: dict[str, Any] = {}
    for constraint in constraints:
        for kind, name in ((annotated_types.Ge, "ge"), (annotated_types.Gt, "gt"), (annotated_types.Le, "le"), (annotated_types.Lt, "lt")):
            if isinstance(constraint, kind):
                bounds[name] = getattr(constraint, name)
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None or high is None:
        words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
        return "".join(f" {words[name]} {bound:g}" for name, bound in bounds.items())
    if "ge" in bounds:
        return f" from {low:g} to {high:g}" if "le" in bounds else f" from {low:g} to below {high:g}"
    return f" above {low:g} and up to {high:g}" if "le" in bounds else f" between {low:g} and {high:g}, both excluded"
