"""Tests of `vitarium generate`: sheets, folders and arrays of images, and user errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vitarium
from vitarium.cli.app import app
from vitarium.generation.grids import HEAD, fitted, grid

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    made = vitarium.create_model("sit_flow_pico", num_classes=3, embed_dim=16, depth=1, num_heads=2)
    made.labels = ["cat", "dog", "emu"]
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    vitarium.save(made, path)
    return str(path)


def test_a_sheet_with_a_column_a_class(model, tmp_path):
    sheet = tmp_path / "sheet.png"
    result = run(app, ["generate", model, "--steps", "2", "--classes", "dog,0", "-n", "3", "-o", str(sheet), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["classes"] == "dog, cat"
    assert Image.open(sheet).size == (2 * 100 - 4, HEAD + 3 * 100 - 4)
    again = tmp_path / "again.png"
    run(app, ["generate", model, "--steps", "2", "--classes", "dog,0", "-n", "3", "-o", str(again)])
    assert again.read_bytes() == sheet.read_bytes()


def test_captions_stand_above_their_columns():
    dark = torch.zeros(4, 1, 8, 8)
    plain, named = grid(dark, 2, smallest=64), grid(dark, 2, smallest=64, captions=["cat", "a name that is much too long"])
    assert named.size == (plain.width, plain.height + HEAD)
    assert named.crop((0, HEAD, *named.size)).tobytes() == plain.tobytes()
    head = np.asarray(named.crop((0, 0, named.width, HEAD)).convert("L"))
    assert (head[:, :64].min(), head[:, 66:].min()) < (128, 128)  # both are written
    assert head[:, 64:66].min() == 255  # and stay in their columns
    assert fitted("abcdef", 5, len) == "ab..."
    assert fitted("abcde", 5, len) == "abcde"


def test_numbers_that_are_names_are_names(tmp_path):
    made = vitarium.create_model("sit_flow_pico", num_classes=5, embed_dim=16, depth=1, num_heads=2)
    made.labels = ["1", "2", "3", "4", "a,b"]
    said = []
    for classes, want in (("1-3", ["1", "2", "3"]), ("#0,#4", ["1", "a,b"]), ("a,b", ["a,b"]), (["a,b", 1], ["a,b", "2"])):
        assert vitarium.generate(made, classes, 1, steps=1, notify=said.append).classes == want
    assert "Generating 3 images of 1 (#0), 2 (#1), 3 (#2)" in said
    vitarium.save(made, tmp_path / "m.safetensors")
    result = run(app, ["generate", str(tmp_path / "m.safetensors"), "--steps", "1", "--classes", "0", "-o", str(tmp_path / "x.png")])
    assert result.exit_code == 2
    assert "written #0" in " ".join(result.output.split())


def test_a_folder_and_an_array_for_evaluators(model, tmp_path):
    assert run(app, ["generate", model, "--steps", "2", "-n", "2", "-o", str(tmp_path / "all")]).exit_code == 0
    assert len(list((tmp_path / "all").glob("*-dog.png"))) == 2
    assert run(app, ["generate", model, "--steps", "2", "-n", "2", "-o", str(tmp_path / "all.npz")]).exit_code == 0
    array = np.load(tmp_path / "all.npz")["arr_0"]
    assert array.shape == (6, 16, 16, 3)
    assert array.dtype == np.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "cow"], "no class 'cow'"),
        (["--classes", "7"], "classes 0 to 2, got 7"),
        (["-o", "x.bmp"], "must end in .png"),
        (["--set", "smapler=heun"], "has no option 'smapler'"),
        (["--set", "sampler=ddpm"], "sampler of a flow must be euler"),
        (["--set", "steps=3"], "is a separate option"),
        (["--set", "heun"], "KEY=VALUE"),
    ],
)
def test_mistakes_are_told(model, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(app, ["generate", model, "--steps", "2", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_classifier_makes_no_pictures(tmp_path):
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=3), tmp_path / "c.safetensors")
    result = run(app, ["generate", str(tmp_path / "c.safetensors")])
    assert result.exit_code == 2
    assert "generates no images of classes" in " ".join(result.output.split())
