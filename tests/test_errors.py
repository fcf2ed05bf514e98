"""Errors: one exit code per kind, similar names at the end of a message, and the install command for missing packages."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from vitarium import errors
from vitarium.errors import MissingExtra, VitariumError, nearest, require

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [("UsageError", 2), ("InputError", 2), ("MissingExtra", 2), ("DataError", 3), ("CheckpointError", 4), ("TrainingStopped", 5)],
)
def test_exit_codes(kind, code):
    error = getattr(errors, kind)
    assert issubclass(error, VitariumError)
    assert error.exit_code == code


def test_nearest():
    names = ["swin_tiny", "swin_small", "convnext_tiny"]
    assert nearest("swin_tinny", names) == "; did you mean swin_tiny, convnext_tiny, swin_small?"
    assert nearest("swin_tinny", names, count=1) == "; did you mean swin_tiny?"
    assert nearest("photo", ["photos", "photos"]) == "; did you mean photos?"
    assert nearest("vnex", names) == "; did you mean convnext_tiny?"
    assert nearest("xyz", names) == ""
    assert nearest("photos", ["hornet"]) == ""
    assert nearest("run", ["sparse_prune"]) == ""
    assert nearest("run", ["my_run"]) == "; did you mean my_run?"
    assert nearest("onnx", ["eager", "onnxruntime", "openvino"]) == "; did you mean onnxruntime?"
    assert nearest("", names) == ""


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name not in ("all", "docs", "dev")])
def test_what_is_missing_is_told_with_the_line_that_installs_it(monkeypatch, extra):
    package = EXTRAS[extra][0].partition(">")[0].replace("-", "_")
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks a module that cannot be imported
    with pytest.raises(MissingExtra, match=rf"{re.escape(package)} is not installed .*pip install 'vitarium\[{extra}\]'"):
        require(package, extra)


def test_what_is_there_is_given():
    assert require("json", "all").loads("1") == 1
