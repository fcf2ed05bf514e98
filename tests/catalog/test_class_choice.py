"""Choice of classes by text: names first, numbers where they are unambiguous, #number always."""

from __future__ import annotations

import pytest

from vitarium.catalog.class_choice import choose_class, choose_classes, describe_classes
from vitarium.errors import UsageError

NUMBERS = ["1", "2", "3", "4", "5"]
WORDS = ["cat", "dog", "a,b", "emu", "10-12"]


@pytest.mark.parametrize(
    ("given", "names", "want"),
    [
        ("1-3", NUMBERS, [0, 1, 2]),
        ("5,1", NUMBERS, [4, 0]),
        ("#0", NUMBERS, [0]),
        ("#1-3", NUMBERS, [1, 2, 3]),
        ("#1-#3", NUMBERS, [1, 2, 3]),
        ([1, "1"], NUMBERS, [1, 0]),
        ("2-3", ["3", "2", "1"], [1, 0]),
        ("dog,0", WORDS, [1, 0]),
        ("0-1, emu", WORDS, [0, 1, 3]),
        ("a,b", WORDS, [2]),
        (r"cat,a\,b", WORDS, [0, 2]),
        (["a,b", "cat,emu", 1], WORDS, [2, 0, 3, 1]),
        ("10-12", WORDS, [4]),
        ("1-3,0", None, [1, 2, 3, 0]),
        (None, WORDS, [0, 1, 2, 3, 4]),
    ],
)
def test_classes(given, names, want):
    assert choose_classes(given, 5, names) == want


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        ("0", NUMBERS, "no class '0'.*classes: 1, 2, 3, 4, 5.*written #0"),
        ("0-2", NUMBERS, "no class '0'"),
        ("4-9", NUMBERS, "no class '6'"),
        ("#5", NUMBERS, "classes 0 to 4, got 5"),
        ("1-99999999", NUMBERS, "no class '6'"),
        ("3-1", WORDS, "write it as 1-3"),
        ("cta", WORDS, "did you mean cat"),
        ("7", WORDS, "classes 0 to 4, got 7"),
        ("²", WORDS, "no class"),
        ("9" * 5000, None, "no class"),
        ("", WORDS, "no class was named"),
        ([], WORDS, "no class was named"),
        ([-1], WORDS, "classes 0 to 4, got -1"),
        ([True], WORDS, "got True"),
        ("b", None, "its classes are the numbers 0 to 4"),
    ],
)
def test_what_names_no_class_is_told(given, names, message):
    with pytest.raises(UsageError, match=message):
        choose_classes(given, 5, names)


def test_one_class():
    assert choose_class("2", 5, NUMBERS) == 1
    assert choose_class(2, 5, NUMBERS) == 2
    assert choose_class("#2", None, None) == 2
    assert choose_class("a,b", 5, WORDS) == 2
    for several in ("0-1", "0-999999999"):
        with pytest.raises(UsageError, match="name one"):
            choose_class(several, None, None)


def test_what_was_chosen_is_said():
    assert describe_classes([1, 0, 1], WORDS) == "dog (#1), cat (#0)"
    assert describe_classes(range(12), None) == "#0, #1, #2, #3, #4, #5, #6, #7, #8, #9 and 2 more"
