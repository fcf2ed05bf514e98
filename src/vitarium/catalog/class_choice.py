r"""Choice of a model's classes by text: by name first, by number where that is unambiguous, and by `#number` always.

cat        the class of that name; a name that contains a comma is written with \, in a list
#3         the class number 3, counted from 0, whatever the names are
3          the class named "3"; in a model none of whose names is a number, the class number 3
3-5, #3-5  the classes 3, 4 and 5 by the same rules
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitarium.errors import UsageError, nearest


def choose_class(word: int | str, num_classes: int | None, names: Sequence[str] | None) -> int:
    """Return the number of one class.

    Args:
        word: a number, counted from 0, or a text of the forms of this module that means one class.
        num_classes: of the model; None or 0: not known.
        names: of the classes, in their order; None: they have none.

    Raises:
        UsageError: no such class, or a text that means several.
    """
    if isinstance(word, int):
        return _numbered(word, num_classes)
    found = _chosen(word, num_classes, names)
    if len(found) != 1:
        raise UsageError(f"{word!r} names {len(found)} classes; name one")
    return found[0]


def choose_classes(given: str | Sequence[int | str] | None, num_classes: int, names: Sequence[str] | None) -> list[int]:
    r"""Return the numbers of several classes, in the order in which they are given.

    Args:
        given: a text such as "cat,#3-5", in which a comma that belongs to a name is written as \, (not if the whole text is a name); or a
            sequence of numbers, counted from 0, and texts; None: all classes.
        num_classes, names: of the model.

    Raises:
        UsageError: no class, or one that the model does not have.
    """
    if given is None:
        return list(range(num_classes))
    if isinstance(given, str):
        words: list[int | str] = list(_words(given, names))
    else:
        words = [word for item in given for word in (_words(item, names) if isinstance(item, str) else [item])]
    found: list[int] = []
    for word in words:
        found += _chosen(word, num_classes, names) if isinstance(word, str) else [_numbered(word, num_classes)]
    if not found:
        raise UsageError("no class was named; write names, or numbers as #0, separated by commas, as cat,#3-5")
    return found


def describe_classes(chosen: Sequence[int], names: Sequence[str] | None, most: int = 10) -> str:
    """Return the chosen classes as text with both name and number, such as "cat (#0), dog (#1)"."""
    shown = [f"{names[number]} (#{number})" if names else f"#{number}" for number in dict.fromkeys(chosen)]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _words(text: str, names: Sequence[str] | None) -> list[str]:
    """Split a text at the commas that no backslash precedes."""
    if names is not None and text in names:
        return [text]
    parts = (part.replace(r"\,", ",").strip() for part in re.split(r"(?<!\\),", text))
    return [part for part in parts if part]


def _chosen(word: str, num_classes: int | None, names: Sequence[str] | None) -> list[int]:
    """Return the numbers of the classes that one word means."""
    if names is not None and word in names:
        return [list(names).index(word)]
    form = re.fullmatch(r"(#?)(\d{1,9})(?:\s*-\s*#?(\d{1,9}))?", word, re.ASCII)
    if form is None:
        raise UsageError(_unknown(word, num_classes, names))
    marked, first, last = form[1], int(form[2]), int(form[3] or form[2])
    if last < first:
        raise UsageError(f"the range {word!r} ends before it begins; write it as {last}-{first}")
    if not marked and names is not None and any(name.isdecimal() for name in names):  # numbers are names here
        wanted = [str(number) for number in range(first, min(last, first + len(names)) + 1)]
        if missing := [name for name in wanted if name not in names]:
            raise UsageError(_unknown(missing[0], num_classes, names) + f"; the class number {missing[0]} is written #{missing[0]}")
        return [list(names).index(name) for name in wanted]
    _numbered(last, num_classes)
    if not num_classes and last > first:
        raise UsageError(f"{word!r} names several classes; name one")
    return list(range(first, last + 1))


def _numbered(number: int, num_classes: int | None) -> int:
    if isinstance(number, bool) or number < 0 or (num_classes and number >= num_classes):
        known = f"0 to {num_classes - 1}" if num_classes else "from 0"
        raise UsageError(f"the model has the classes {known}, got {number}")
    return number


def _unknown(word: str, num_classes: int | None, names: Sequence[str] | None) -> str:
    if not names:
        known = f"; its classes are the numbers 0 to {num_classes - 1}" if num_classes else "; its classes are numbers"
        return f"the model has no class {word!r}{known}"
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"the model has no class {word!r}{nearest(word, list(names))} (classes: {listed})"
