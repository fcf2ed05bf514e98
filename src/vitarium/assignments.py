"""Parsing of options that are written as text: NAME=VALUE, and NAME or NAME:KEY=VALUE,KEY=VALUE."""

from __future__ import annotations

import re
from typing import Any

from vitarium.errors import UsageError
from vitarium.plain_yaml import parse_yaml


def split_assignment(text: str, form: str) -> tuple[str, str]:
    """Split "NAME=VALUE" into a name and a value, both as text without surrounding spaces.

    Args:
        text: the assignment; the name consists of words separated by points, such as "optimizer.lr".
        form: the accepted form, for the error message, such as "--set wants KEY=VALUE".

    Raises:
        UsageError: there is no equals sign, or no proper name before it.
    """
    name, equals, value = (piece.strip() for piece in text.partition("="))
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", name):
        raise UsageError(f"{form}; got {text!r}")
    return name, value


def parse_assignment(text: str, form: str) -> tuple[str, Any]:
    """Parse "NAME=VALUE", the value as YAML.

    Args:
        text, form: see `split_assignment`.

    Raises:
        UsageError: not of this form, or a value that is not plain YAML.
    """
    name, value = split_assignment(text, form)
    return name, parse_yaml(value, f"the value of {name!r}")


def split_options(text: str) -> list[str]:
    """Split "A=1,B=[2,3]" at the commas outside brackets; empty parts are left out."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a name with options, the form of methods and explainers in commands: "pitome" or "evit:keep=0.7,blocks=[3,6,9]".

    Returns:
        name, and the options by name, values parsed as YAML.

    Raises:
        UsageError: an option is not NAME=VALUE, is given twice, or has a value that is not plain YAML.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in split_options(rest):
        form = f"cannot read {part!r} in {text!r}: options are written NAME=VALUE, separated by commas, after {name.strip()}:"
        key, value = parse_assignment(part, form)
        if key in options:
            raise UsageError(f"{text!r} sets {key} twice; leave one out")
        options[key] = value
    return name.strip(), options
