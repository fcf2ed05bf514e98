"""Texts of others (file names, labels, messages of decoders) in a form that is safe to print."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

KEPT = "\n\t"
"""Control characters that layout needs."""

HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, the separators of lines and paragraphs, characters that reorder the text around them (by which one name can look like
another), and lone surrogates."""

SURROGATES = re.compile("[\ud800-\udfff]")

SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str, keep: str = KEPT) -> str:
    """Return a text in which characters that a terminal would obey, or that no encoding has, are shown as escapes.

    Control characters (the escape sequences of terminals begin with one) become "\\x1b", bytes of a file name that is not UTF-8 "\\xe9",
    other lone surrogates and characters that change the direction of writing "\\u202e". All other text is unchanged.

    Args:
        text: any text, such as a path.
        keep: characters that stay; "" for a name in a list with one line each.
    """
    return HARMFUL.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates, such as bytes of a folder's name that are not UTF-8, become escapes."""
    return SURROGATES.sub(lambda found: _escape(found[0]), text)


def indented(lines: Sequence[str], count: int = 10) -> str:
    """Return lines of a message, indented by two spaces: at most `count` of them, and the number of the others."""
    more = [f"and {len(lines) - count} more"] if len(lines) > count else []
    return "\n".join(f"  {line}" for line in [*lines[:count], *more])


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's form of a byte that could not be decoded
        code -= 0xDC00
    return SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def first_paragraph(doc: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
