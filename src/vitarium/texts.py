"""Texts of others (file names, labels, messages of decoders) in a form that is safe to print."""

from __future__ import annotations

import unicodedata

KEPT = "\n\t"
"""Control characters that layout needs."""

DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that reorder the text around them, by which one name can look like another."""

SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str, keep: str = KEPT) -> str:
    """Return a text in which characters that a terminal would obey, or that no encoding has, are shown as escapes.

    Control characters (the escape sequences of terminals begin with one) become "\\x1b", bytes of a file name that is not UTF-8 "\\xe9",
    other lone surrogates and characters that change the direction of writing "\\u202e". All other text is unchanged.

    Args:
        text: any text, such as a path.
        keep: characters that stay; "" for a name in a list with one line each.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _harmful(c) else _escape(c) for c in text)


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates, such as bytes of a folder's name that are not UTF-8, become escapes."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return "".join(_escape(c) if "\ud800" <= c <= "\udfff" else c for c in text)


def _harmful(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTIONS


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's form of a byte that could not be decoded
        code -= 0xDC00
    return SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
