"""Tests of `vitarium index` and `vitarium search`, including user errors."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import vitarium


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.png", "darkred"), ("deep/c.png", "blue"), ("deep/d.png", "navy")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "in"


def test_pictures_are_indexed_and_found(run, model, folder, tmp_path):
    index = tmp_path / "pictures.index"
    made = run("index", folder, "--model", model, "--output", index, "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out) | {"seconds": 0} == {
        "index": str(index),
        "images": 4,
        "read": 4,
        "kept": 0,
        "gone": 0,
        "seconds": 0,
        "numbers": 48,
        "broken": [{"image": str(folder / "broken.png"), "error": json.loads(made.out)["broken"][0]["error"]}],
    }
    assert "skipped" in made.err
    query = tmp_path / "query.png"
    Image.new("RGB", (40, 40), "red").save(query)
    found = run("search", index, query, folder / "deep" / "c.png", "--top-k", 2, "--output", tmp_path / "sheet.png", "--json")
    assert found.code == 0, found.err
    rows = json.loads(found.out)
    assert rows[0]["found"][0]["image"].endswith("a.png")
    assert rows[0]["found"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert [len(row["found"]) for row in rows] == [2, 2]
    assert not any(one["image"].endswith("c.png") for one in rows[1]["found"])  # itself
    assert Image.open(tmp_path / "sheet.png").width > 300


def test_a_second_call_reads_what_changed_and_another_model_all(run, model, folder, tmp_path):
    index = tmp_path / "pictures.index"
    run("index", folder, "--model", model, "--output", index)
    (folder / "a.png").unlink()
    Image.new("RGB", (20, 20), "green").save(folder / "e.png")
    again = json.loads(run("index", folder, "--model", model, "--output", index, "--json").out)
    assert (again["read"], again["kept"], again["gone"]) == (1, 3, 1)
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16), tmp_path / "other.safetensors")
    other = run("index", folder, "--model", tmp_path / "other.safetensors", "--output", index)
    assert "of another model" in other.out
    told = run("search", index, folder / "e.png", "--model", model)
    assert (told.code, "made by another model" in told.err) == (4, True)


def test_mistakes_are_told(run, model, folder, tmp_path):
    index = tmp_path / "pictures.index"
    run("index", folder, "--model", model, "--output", index)
    (tmp_path / "empty").mkdir()
    for arguments, code, told in (
        (("index", tmp_path / "empty", "--model", model, "--output", index), 3, "holds no images"),
        (("index", folder / "broken.png", "--model", model, "--output", tmp_path / "x.index"), 3, "no image could be read"),
        (("index", folder, "--model", model, "--output", model), 4, "is not an index"),
        (("search", model, folder), 4, "is not an index"),
        (("search", tmp_path / "none.index", folder), 4, "there is no file"),
        (("search", index, folder / "broken.png"), 3, "no image could be read"),
        (("search", index, folder, "--output", tmp_path / "x.txt"), 2, "must end in"),
    ):
        result = run(*arguments)
        assert (result.code, told in result.err) == (code, True), (arguments, result.err)
    model.rename(tmp_path / "moved.safetensors")
    gone = run("search", index, folder / "a.png")
    assert (gone.code, "--model FILE" in gone.err) == (4, True)
    assert run("search", index, folder / "a.png", folder / "broken.png", "--model", tmp_path / "moved.safetensors").code == 0


def test_an_index_is_used_and_updated_from_another_folder_and_moves_with_its_images(run, model, folder, tmp_path, monkeypatch):
    assert run("index", "in", "--model", "model.safetensors", "--output", "in/i.index").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = run("search", "../in/i.index", "../in/a.png", "--itself", "--json")
    assert json.loads(found.out)[0]["found"][0]["image"] == str(folder / "a.png")
    again = json.loads(run("index", "../in", "--model", "../model.safetensors", "--output", "../in/i.index", "--json").out)
    assert (again["kept"], again["gone"]) == (4, 0)
    folder.rename(tmp_path / "moved")
    found = run("search", "../moved/i.index", "../moved/a.png", "--itself", "--json")
    assert json.loads(found.out)[0]["found"][0]["image"] == str(tmp_path / "moved" / "a.png")
