"""Test that `compare` reads the records of tests/golden/write.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tests.golden
from tests.golden import compare, fill_state, make_input
from tests.golden.write import main, parse_input, write


class Toy(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, width)

    def forward(self, x):
        return self.head(self.norm(x))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tests.golden, "FOLDER", tmp_path)
    return tmp_path


def test_a_golden_is_found_again_by_another_implementation(folder):
    doc = write("toy-a", Toy(), {"x": {"shape": [5, 3]}}, source="here", config={}, folder=folder)
    state = fill_state(doc["state"])
    other = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).double().eval()
    other.load_state_dict({k.replace("norm", "0").replace("head", "1"): v for k, v in state.items()})
    with torch.no_grad():
        assert compare("toy-a", {"output": other(make_input("x", doc["inputs"]["x"]))}) < 1e-12
        other[1].bias[0] += 1e-3
        assert compare("toy-a", {"output": other(make_input("x", doc["inputs"]["x"]))}) > 1e-5
    assert doc["parameters"] == sum(p.numel() for p in Toy().parameters())


def test_outputs_that_are_not_finite_ask_for_overrides(folder):
    with pytest.raises(ValueError, match="not finite; tame the fill"):
        write("toy-b", Toy(), {"x": {"shape": [5, 3]}}, lambda m, x: {"y": m(x) / 0}, source="here", config={}, folder=folder)
    doc = write("toy-b", Toy(), {"x": {"shape": [5, 3]}}, source="h", config={}, overrides=[("head", "zeros")], folder=folder)
    assert doc["outputs"]["output"]["std"] == 0


def test_the_command(folder, monkeypatch, capsys):
    monkeypatch.setattr("tests.golden.write.FOLDER", folder)
    monkeypatch.setattr(write, "__kwdefaults__", {**write.__kwdefaults__, "folder": folder})
    main(["toy-c", "--model", f"{__name__}:Toy", "--config", '{"width": 2}', "--input", "x=5,3", "--source", "here"])
    assert "14 parameters" in capsys.readouterr().out
    assert (folder / "toy-c.npz").is_file()
    assert parse_input("y=2:randint:10") == ("y", {"shape": [2], "kind": "randint:10"})
