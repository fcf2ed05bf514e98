"""Tests of `vitarium restore`, including user errors."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import vitarium


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    made = vitarium.create_model("drct_pico", depths=[1], embed_dim=16)
    made.start_as_interpolation()
    vitarium.save(made, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "in" / "a.jpg")
    Image.new("L", (9, 50)).save(tmp_path / "in" / "deep" / "b.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "in"


def test_pictures_are_restored_and_broken_ones_named(run, model, folder, tmp_path):
    result = run("restore", folder, "--model", model, "--tile", 32, "--overlap", 8, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    rows = {row["image"].split("in/")[1]: row for row in json.loads(result.out)}
    assert rows["a.jpg"]["restored_size"] == [80, 60]
    assert "not an image" in rows["broken.png"]["error"]
    assert "1 of 3 images could not be restored" in result.err
    large = Image.open(tmp_path / "out" / "a.png")
    assert large.size == (80, 60)
    assert max(abs(a - b) for a, b in zip(large.getpixel((40, 30)), (255, 165, 0), strict=True)) < 4
    assert Image.open(tmp_path / "out" / "deep" / "b.png").mode == "L"
    assert not (tmp_path / "out" / "broken.png").exists()


def test_the_table_names_sizes_and_places(run, model, folder, tmp_path):
    result = run("restore", folder / "a.jpg", folder / "broken.png", "--model", model, "--output", tmp_path / "out")
    assert result.code == 0
    assert "40x30" in result.out
    assert "80x60" in result.out
    assert "skipped" in result.out


def test_nothing_that_can_be_read_is_an_error(run, model, folder, tmp_path):
    result = run("restore", folder / "broken.png", folder / "none.png", "--model", model, "--output", tmp_path / "out")
    assert result.code == 3
    assert "no image could be restored" in result.err
    assert "none.png" in result.err


def test_mistakes_are_told_before_any_work(run, model, folder, tmp_path):
    picture = folder / "a.jpg"
    for arguments, told in (
        ((picture, "--model", model, "--output", picture), "must be a folder"),
        ((picture, "--model", model, "--output", tmp_path / "out", "--tile", 40, "--overlap", 30), "needs tiles of at least"),
        ((folder / "deep" / "b.png", "--model", model, "--output", folder / "deep"), "would replace it"),
        ((folder / "a.jpg", picture, "--model", model, "--output", tmp_path / "out"), "would both be"),
    ):
        result = run("restore", *arguments)
        assert (result.code, told in result.err) == (2, True), result.err


def test_a_model_of_another_kind_is_refused(run, folder, tmp_path):
    vitarium.save(vitarium.create_model("swin_pico", num_classes=2), tmp_path / "swin.safetensors")
    result = run("restore", folder, "--model", tmp_path / "swin.safetensors", "--output", tmp_path / "out")
    assert result.code == 2
    assert "does not restore images" in result.err
