"""Safe parsing of YAML that users write: settings files and the values of options."""

from __future__ import annotations

import re
from typing import Any

import yaml

from vitarium.errors import UsageError

MAX_BYTES = 64 * 1024
"""Largest accepted settings file; a larger one is a mistake."""


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML of plain values (no tags, no anchors).

    Args:
        text: the YAML.
        source: its name in error messages.

    Raises:
        UsageError: too long, not YAML, with anchors (which can expand to any size) or duplicate keys, or nested too deeply.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{source} has {len(text):,} characters; settings have at most {MAX_BYTES:,}")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{source} is not plain YAML{where}: {problem}") from error
    except RecursionError as error:
        raise UsageError(f"{source} is not plain YAML: nested too deeply") from error
    except ValueError as error:  # such as a date that does not exist
        raise UsageError(f"{source} is not plain YAML: {error}") from error


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors and aliases are not accepted here; write the value out",
                event.start_mark,  # type: ignore[arg-type]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key.value, str) else False:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


_PlainLoader.add_implicit_resolver(  # YAML 1.1 reads 1e-4 as text: a float needs a point, 1.0e-4
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
