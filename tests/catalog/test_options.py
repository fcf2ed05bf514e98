"""Options of methods: accepted values, rejected values, error messages."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from vitarium.catalog.methods import build_method, find_method, list_methods, parse_method
from vitarium.catalog.options import Numbers, Patterns, Share, describe, validated
from vitarium.errors import DataError, UsageError


@validated
class Cook:
    heat: Share = 0.5
    minutes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    steps: Numbers = ()
    skip: Patterns = ()
    dry: bool = False
    data: Any = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.dry and self.heat == 1:
            raise UsageError("dry food burns at full heat")
        if self.minutes == 13:
            raise DataError("no clock")


def test_accepts():
    cook = Cook(1, minutes=3, steps=[1, 2], skip="head")
    assert (cook.heat, cook.steps, cook.skip) == (1.0, (1, 2), ("head",))
    images = torch.zeros(3)
    assert Cook(data=images).data is images
    assert Cook() == Cook(data=4)
    assert hash(cook) == hash(Cook(1.0, 3, (1, 2), ("head",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cook.heat = 0.1
    assert dataclasses.replace(cook, minutes=9).minutes == 9
    assert copy.deepcopy(cook) == pickle.loads(pickle.dumps(cook)) == cook


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heat": 0}, "Cook: heat must be a number above 0 and up to 1, got 0"),
        ({"heat": float("nan")}, "heat must be a number above 0 and up to 1, got nan"),
        ({"heat": "1"}, "heat must be a number above 0 and up to 1, got '1'"),
        ({"heat": True}, "heat must be a number above 0 and up to 1, got True"),
        ({"minutes": 0}, "minutes must be a whole number of at least 1 or 'auto', got 0"),
        ({"minutes": "aut"}, "or 'auto', got 'aut'; did you mean auto?"),
        ({"steps": (1, -2)}, r"steps must be a list with a whole number of at least 0 each, got \(1, -2\)"),
        ({"skip": (1,)}, r"skip must be a list with text each, got \(1,\)"),
        ({"dry": 1}, "dry must be true or false, got 1"),
        ({"haet": 1}, "Cook has no option 'haet'; did you mean heat"),
        ({"dry": True, "heat": 1}, "^dry food burns at full heat$"),
        ({"heat": 2, "dry": 3}, "heat must .*\n  Cook: dry must"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        Cook(**options)


def test_errors_of_post_init_keep_their_kind():
    with pytest.raises(DataError, match="no clock"):
        Cook(minutes=13)


def test_ranges_in_words():
    for constraint, words in [
        (Field(ge=1), " of at least 1"),
        (Field(gt=0, lt=1), " between 0 and 1, both excluded"),
        (Field(ge=0, lt=1), " from 0 to below 1"),
        (Field(le=3), " of at most 3"),
        (Field(), ""),
    ]:
        assert describe(Annotated[int, constraint]) == "a whole number" + words


def test_every_method_checks_its_fields_and_survives_a_file():
    """A bool is no number, an unknown name is refused by the constructor too, and saved options build an equal method."""
    assert {"evit", "tome", "pitome", "lora", "vpt_proxies", "int8", "int4w", "mptq_vit", "sparse_prune"} <= set(list_methods())
    for slug in list_methods():
        cls = find_method(slug)
        if not cls.__module__.startswith("vitarium"):
            continue
        assert hasattr(cls, "__pydantic_fields__"), f"{slug}: use @validated"
        assert build_method(slug, cls().options()) == cls()
        assert parse_method(str(cls())) == cls()
        for field in dataclasses.fields(cls):
            if type(field.default) in (int, float):
                with pytest.raises(UsageError, match=rf"{slug}: {field.name} must be .*, got True"):
                    cls(**{field.name: True})
        with pytest.raises(UsageError, match="has no option 'no_such'"):
            cls(no_such=1)


def test_methods_as_text():
    assert str(parse_method("lora:alpha=8.0,rank=4")) == "lora:rank=4"
    assert str(parse_method("pitome:keep=1")) == "pitome:keep=1"
    assert str(parse_method("sparse_prune:structure=2:4,exclude=head")) == "sparse_prune:structure=2:4,exclude=[head]"
    assert parse_method("lora:alpha=1e-1").alpha == 0.1
