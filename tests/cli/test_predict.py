"""The table of `vitarium predict`: whole names, and a limit where everything is in a file."""

import errno
import json
import os
import shutil

import pytest
import torch

import vitarium
from tests.data.pictures import put
from vitarium.errors import CheckpointError


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16, depth=1)
    model.labels = ["cat", "dog"]
    vitarium.save(model, tmp_path / "model.safetensors")
    for number in range(23):
        put(tmp_path / "images" / f"{'a_long_name_of_an_image_' * 3}{number:02d}.png")
    return tmp_path


def test_the_table_is_limited_only_where_all_rows_are_in_a_file(run, files):
    given = ("predict", "images", "--model", "model.safetensors")
    assert run(*given).out.count(".png") == 23
    limited = run(*given, "--output", "answers.json")
    assert limited.out.count(".png") == 20
    assert limited.out.rstrip().endswith("... 3 more in answers.json")
    assert len(json.loads((files / "answers.json").read_text())) == 23


def test_names_are_whole_on_a_narrow_terminal(run, files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = run("predict", files / "images", "--model", "model.safetensors").out
    lines = "".join(line[:30].strip() for line in shown.splitlines())
    assert "image_22.png" in lines


def test_the_text_of_a_result_has_the_labels(files):
    found = vitarium.predict(files / "images", files / "model.safetensors")
    first = found.rows[0]["predictions"][0]
    assert f"00.png: {first['label']} {100 * first['probability']:.1f} %" in repr(found)
    assert "and 20 more" in repr(found)


@pytest.mark.parametrize("given", [("--output", "answers.json"), ("--output", "answers.csv", "--json")])
def test_what_was_computed_is_printed_when_its_file_cannot_be_written(run, files, monkeypatch, given):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("predict", "images", "--model", "model.safetensors", *given)
    assert result.code == 2
    assert f"error: cannot write {given[1]}: No space left on device; " in result.err
    assert not (files / given[1]).exists()
    assert "not readable" not in result.out, "no summary beside the table"
    assert len(json.loads(result.out)["images"]) == 23 if "--json" in given else result.out.count("image_22.png") == 1


@pytest.mark.parametrize(("pattern", "folder"), [("images/*.jpg", "images"), ("*/a.png", "."), ("im[0-9].png", ".")])
def test_a_pattern_that_was_quoted_is_explained(run, files, pattern, folder):
    result = run("predict", pattern, "--model", "model.safetensors")
    assert result.code == 2
    wanted = f"there is no file {pattern}: patterns are expanded by the shell, not here; leave out the quotes, or give the folder {folder}"
    assert wanted in result.err


def test_a_file_with_the_signs_of_a_pattern_is_read(run, files):
    put(files / "one[1].png")
    result = run("predict", "one[1].png", "--model", "model.safetensors")
    assert result.code == 0, result.err


def test_the_folder_of_kept_graphs_is_no_near_name(files):
    (files / "m.safetensors.vitarium").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError) as caught:
        vitarium.predict(files / "images", files / "m.safetensors")
    assert ".vitarium" not in str(caught.value)


def test_no_work_is_done_for_a_place_that_cannot_be_written(run, files, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    result = run("predict", "images", "--model", "model.safetensors", "--output", "a.csv")
    assert (result.code, result.out) == (2, "")
    assert "cannot write a.csv: Read-only file system" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.safetensors", "--model", "one.png"],
            "model.safetensors is a file of weights, and images are wanted here: give it as --model",
        ),
        (["one.png", "--model", "one.png"], "one.png is an image, and a model is wanted here"),
        (["one.png", "model.safetensors"], "model.safetensors is a model, not an image: write --model model.safetensors"),
        (["one.png", "--model", "run"], "run is the folder of a training that has not ended"),
        (["one.png", "--model", "run/model.safetensors"], "The command that began it resumes it (vitarium train ... --out run)"),
        (["one.png", "--model", "run/last.ckpt"], "last.ckpt is its state, from which no command opens a model"),
        (["one.png", "--model", "done"], "done is a folder; name its file: done"),
        (["one.png", "--model", "done/last.ckpt"], "holds the state of a training, not a model; name its file: done"),
        (
            ["one.png", "--model", "model.safetensors", "--runtime", "onnx"],
            "'compile', 'onnxruntime', 'openvino'; did you mean onnxruntime?",
        ),
    ],
)
def test_mistakes_name_what_was_meant(run, files, arguments, message):
    put(files / "one.png")
    for folder in ("run", "done"):
        (files / folder).mkdir()
        (files / folder / "last.ckpt").write_bytes(b"x")
    shutil.copy(files / "model.safetensors", files / "done")
    result = run("predict", *arguments)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
