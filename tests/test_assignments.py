"""Tests of parsing options from text."""

from __future__ import annotations

import pytest

from vitarium.assignments import parse_assignment, parse_call, split_assignment, split_options
from vitarium.errors import UsageError


def test_an_assignment_is_split_at_its_first_equals_sign():
    assert split_assignment(" optimizer.lr = a=b ", "KEY=VALUE") == ("optimizer.lr", "a=b")
    assert parse_assignment("steps=[1, 2]", "KEY=VALUE") == ("steps", [1, 2])
    assert parse_assignment("name=", "KEY=VALUE") == ("name", None)


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", ".a=1", "a b=1", ""])
def test_another_form_is_refused_with_the_accepted_one(text):
    with pytest.raises(UsageError, match="an option has the form KEY=VALUE; got "):
        parse_assignment(text, "an option has the form KEY=VALUE")


def test_a_value_that_is_not_plain_yaml_names_its_option():
    with pytest.raises(UsageError, match="the value of 'keep' is not plain YAML"):
        parse_call("evit:keep=[1")


def test_commas_inside_brackets_do_not_separate_options():
    assert split_options("keep=0.7, blocks=[3,6,9],,table={a: [1, 2], b: 3}") == ["keep=0.7", "blocks=[3,6,9]", "table={a: [1, 2], b: 3}"]
    assert parse_call("evit:keep=0.7,blocks=[3,6,9]") == ("evit", {"keep": 0.7, "blocks": [3, 6, 9]})
    assert parse_call(" pitome ") == ("pitome", {})


@pytest.mark.parametrize(("text", "message"), [("evit:0.7", "cannot read '0.7' in 'evit:0.7'"), ("evit:keep=1,keep=2", "sets keep twice")])
def test_a_call_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_call(text)
