"""Tests of `explain`: overlays, measures, and user errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitarium
from vitarium.explanation.t_tame import TTAME


@pytest.fixture
def files(tmp_path):
    """A classifier, the same with an attention module, and a folder of pictures, one of them broken."""
    torch.manual_seed(0)
    classifier = vitarium.create_model("timm/vit_pico", num_classes=3).eval()
    classifier.labels = ["cat", "dog", "hen"]
    vitarium.save(classifier, tmp_path / "vit.safetensors")
    vitarium.save(TTAME.over(classifier), tmp_path / "tame.safetensors")
    rng = np.random.default_rng(0)
    for name, size in (("a/one.png", (20, 30)), ("b/one.png", (40, 20)), ("two.png", (16, 16))):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(path)
    (tmp_path / "pictures/broken.png").write_bytes(b"no picture")
    return tmp_path


def test_overlays_and_measures(run, files):
    result = run("explain", "pictures", "--model", "tame.safetensors", "--method", "t_tame", "--method", "random", "--measure", "-o", "out")
    assert result.code == 0, result.err
    assert "1 of 4 images could not be explained" in result.err
    assert "average drop 50 % of the map" in result.out
    report = json.loads((files / "out/explanations.json").read_text())
    assert [("error" in row) for row in report["images"]] == [False, False, True, False]
    drawn = {e["overlay"] for row in report["images"] for e in row.get("explanations", [])}
    assert drawn == {path.name for path in (files / "out").glob("*.png")}
    assert len(drawn) == 6  # two pictures of one name do not overwrite each other
    for row in report["images"]:
        for e in row.get("explanations", []):
            width, height = Image.open(files / row["image"]).size
            assert 0 <= e["peak"][0] < width
            assert 0 <= e["peak"][1] < height
            assert set(e["measures"]) >= {"average_drop_50", "increase_15", "insertion", "deletion", "road"}
    one = [row["explanations"][0]["measures"]["deletion"] for row in report["images"] if "error" not in row]
    assert report["measures"]["t_tame"]["deletion"] == pytest.approx(sum(one) / 3)


def test_a_class_by_name_and_by_number(run, files):
    by_name, by_number = (
        json.loads(run("explain", "pictures/two.png", "--model", "vit.safetensors", "--target", t, "-o", "out", "--json").out)
        for t in ("hen", "2")
    )
    assert by_name == by_number
    assert by_name["images"][0]["target"]["label"] == "hen"
    assert by_name["images"][0]["explanations"][0]["method"] == "grad_cam"
    assert (files / "out/two-grad_cam.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pictures", "--method", "gradcam"], 2, "did you mean grad_cam"),
        (["pictures", "--method", "t_tame"], 2, "vitarium train t_tame"),
        (["pictures", "--method", "rise:mask=3"], 2, "did you mean masks"),
        (["pictures", "--target", "cot"], 2, "did you mean cat"),
        (["pictures", "--target", "3"], 2, "classes 0 to 2"),
        (["pictures/broken.png"], 3, "no image could be explained"),
        (["absent.png"], 3, "no such file"),
        (["out"], 3, "holds no images"),
        (["absent", "--method", "nope", "--model", "absent"], 2, "unknown explanation method 'nope' (explanation methods: grad_cam, "),
        (["pictures", "-o", "vit.safetensors"], 2, "is a file"),
    ],
)
def test_mistakes(run, files, arguments, code, message):
    (files / "out").mkdir()
    result = run("explain", *arguments, "--model", "vit.safetensors", *(() if "-o" in arguments else ("-o", "out")))
    assert result.code == code, result.err
    assert message in result.err


def test_an_unknown_method_is_reported_before_a_missing_output(run, files):
    result = run("explain", "pictures", "--method", "rolout", "--model", "vit.safetensors")
    assert result.code == 2
    assert "error: unknown explanation method 'rolout'; did you mean rollout? (" in result.err


def test_a_method_that_does_not_fit_names_those_that_do(run, files):
    vitarium.save(vitarium.create_model("convnext_pico", num_classes=3, image_size=16), files / "convnext.safetensors")
    result = run("explain", "pictures", "--method", "rollout", "--model", "convnext.safetensors", "-o", "out")
    assert result.code == 2
    assert "rollout does not work on this model: " in result.err
    assert "Methods that work on it: grad_cam, gradient_input, " in result.err
    assert "rollout" not in result.err.partition("Methods that work")[2]


def test_results_inside_the_input_are_no_input_of_the_next_call(run, files):
    for times in range(2):
        result = run("explain", "pictures/a", "--model", "vit.safetensors", "-o", "pictures/a/why", "--json")
        assert result.code == 0, result.err
        assert len(json.loads(result.out)["images"]) == 1
        assert ("left out: 1 images at pictures/a/why" in result.err) == bool(times)
    assert (
        "is the folder of the images; choose another output"
        in run("explain", "pictures", "--model", "vit.safetensors", "-o", "pictures").err
    )


def test_an_image_of_others_is_never_replaced(run, files):
    before = (files / "pictures/two.png").read_bytes()
    for command in (
        ["export", "vit.safetensors", "-o", "pictures/two.png"],
        ["predict", "pictures/a", "--model", "vit.safetensors", "-o", "notes.csv"],
        ["evaluate", "vit.safetensors", "--data", "digits", "-o", "notes.csv"],
        ["compress", "vit.safetensors", "--apply", "int8", "-o", "foreign.safetensors"],
        ["probe", "vit.safetensors", "--data", "digits", "-o", "pictures/two.png"],
    ):
        (files / "notes.csv").write_text("image,label\n")
        (files / "foreign.safetensors").write_bytes(b"weights of others")
        result = run(*command)
        assert result.code == 2, (command, result.err)
        assert "is not replaced" in result.err or "must end in" in result.err
    assert (files / "pictures/two.png").read_bytes() == before
    assert (files / "notes.csv").read_text() == "image,label\n"
