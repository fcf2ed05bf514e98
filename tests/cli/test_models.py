"""`models`, `info` and `env`."""

import json

import pytest
import torch

import vitarium
from vitarium.catalog.filters import parse
from vitarium.catalog.index import read_index
from vitarium.catalog.search import cost_of
from vitarium.cli.console import short
from vitarium.cli.indexing import documented_arguments
from vitarium.errors import InputError, UsageError


@pytest.mark.parametrize(
    ("text", "quantity", "inside", "outside"),
    [
        ("params<30M", "params", 29e6, 30e6),
        ("params <= 30m", "params", 30e6, 31e6),
        ("gmacs<4.5", "macs", 4.4e9, 4.5e9),
        ("macs>=1G", "macs", 1e9, 0.9e9),
        ("MB>100", "mb", 101e6, 100e6),
    ],
)
def test_conditions_know_their_units(text, quantity, inside, outside):
    condition = parse(text)
    assert condition.quantity == quantity
    assert condition.holds(inside)
    assert not condition.holds(outside)
    assert not condition.holds(None)


@pytest.mark.parametrize("text", ["", "params", "params=3", "speed<3", "params<", "params<3X", "params<-1", "params<1e6"])
def test_other_conditions_are_refused(text):
    with pytest.raises(UsageError, match="params<30M"):
        parse(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1.00 K"), (28_288_354, "28.3 M"), (999_900, "1.00 M"), (197e6, "197 M"), (None, "-")],
)
def test_numbers_are_shown_with_three_digits(value, text):
    assert short(value) == text


def test_models_as_json(run):
    rows = json.loads(run("models", "*[nt]_pico", "--macs", "--json").out)
    by_name = {row["name"]: row for row in rows}
    assert {"swin_pico", "convnext_pico", "timm/vit_pico"} <= set(by_name)
    swin = by_name["swin_pico"]
    assert swin["params"] == sum(p.numel() for p in vitarium.create_model("swin_pico").parameters())
    assert swin["bytes"] >= 4 * swin["params"]
    assert swin["macs"] > 1e5
    assert swin["room"] == "backbones"
    assert swin["image_size"] == 16


def test_models_that_fit(run):
    every = run("models", "swin_[pt]*")
    assert every.code == 0
    assert "swin_tiny_c24 " in every.out
    few = run("models", "swin_[pt]*", "--fits", "params<30M", "--fits", "gmacs<=4.6", "--fits", "mb<1000")
    assert "swin_tiny " in few.out
    assert "swin_tiny_c24 " not in few.out
    assert "models fit" in few.out


def test_candidates_of_every_family_at_one_size(run):
    """Those that take no such image are left out and named."""
    result = run("models", "*_pico", "--fits", "params<1M", "--fits", "gmacs<1", "--image-size", 32, "--json")
    assert result.code == 0, result.err
    rows = {row["name"]: row for row in json.loads(result.out)}
    assert {"swin_pico", "vim_pico", "timm/vit_pico", "kmax_deeplab_pico"} <= set(rows)
    assert all(0 < row["macs"] < 1e9 and row["params"] < 1e6 for row in rows.values())


def test_what_the_index_does_not_hold_is_shown_and_can_be_measured(run):
    """36 pixels are in no entry; some models take them, others cannot be built for them."""
    read = run("models", "[sv]*_pico", "--macs", "--image-size", 36)
    assert read.code == 0
    assert "?" in next(line for line in read.out.splitlines() if line.startswith("swin_pico"))
    assert "vitarium models '[sv]*_pico' --image-size 36 --measure" in read.err
    result = run("models", "[sv]*_pico", "--macs", "--image-size", 36, "--measure", "--json")
    rows = {row["name"]: row for row in json.loads(result.out)}
    assert rows["swin_pico"]["macs"] > cost_of("swin_pico", 32).macs
    assert "cannot be built for 36 pixels" in result.err
    assert "var_pico" in result.err


def test_only_known_costs_fit(run):
    result = run("models", "swin_pico", "--fits", "gmacs<100", "--image-size", 36)
    assert "0 of 1 models fit" in result.out
    assert "--measure" in result.err


def test_no_model_fits_is_an_answer_and_no_error(run):
    result = run("models", "swin_pico", "--fits", "params<1")
    assert result.code == 0
    assert "0 of 1 models fit" in result.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["swim_tiny"], "did you mean swin_tiny"),
        (["--room", "backbone"], "did you mean backbones"),
        (["--fits", "size<3"], "params<30M"),
        (["--image-size", "0"], "--image-size"),
    ],
)
def test_wrong_questions_about_models(run, arguments, text):
    result = run("models", *arguments)
    assert result.code == 2
    assert text in result.err


def test_info_of_a_model(run):
    report = json.loads(run("info", "swin_tiny", "--json").out)
    assert report["params"] == 28_288_354
    assert [s["stride"] for s in report["stages"]] == [4, 8, 16, 32]
    assert report["preprocessing"]["image_size"] == 224
    assert report["weights"]["in1k"]
    arguments = {a["name"]: a for a in report["arguments"]}
    assert arguments["depths"] == {"name": "depths", "value": [2, 2, 6, 2], "set_by": "variant", "help": arguments["depths"]["help"]}
    assert all(a["help"] for a in arguments.values())
    shown = run("info", "swin_tiny").out
    assert "28.3 M" in shown
    assert "microsoft/Swin-Transformer" in shown


def test_info_of_a_foreign_model_and_another_size(run):
    small, large = (json.loads(run("info", "timm/resnet_pico", "--image-size", size, "--json").out) for size in (16, 32))
    assert large["macs"] > 3 * small["macs"]
    assert "arguments" not in small


def test_info_at_another_size(run):
    """From the index where it holds the size, from the law where it was fitted, by building the model where asked to."""
    known, fitted, unknown = (json.loads(run("info", "convnext_tiny", "--image-size", n, "--json").out) for n in (128, 192, 200))
    assert known["macs"] == cost_of("convnext_tiny", 128).macs == read_index().models["convnext_tiny"][1].sizes[128]
    assert known["macs"] < fitted["macs"] < 4.5e9
    assert unknown["macs"] is None
    assert (unknown["params"], unknown["preprocessing"]["image_size"]) == (28_589_128, 200)
    shown = run("info", "convnext_tiny", "--image-size", 200).out
    assert "?  at 200x200 pixels" in shown
    assert "vitarium info convnext_tiny --image-size 200 --measure" in shown
    measured = json.loads(run("info", "convnext_tiny", "--image-size", 200, "--measure", "--json").out)
    assert fitted["macs"] < measured["macs"] < 4.46e9
    assert measured["peak_memory_mb"] > measured["bytes"] / 1e6


def test_reading_equals_measuring(run):
    read, measured = (json.loads(run("info", "convnext_pico", *more, "--json").out) for more in ([], ["--measure"]))
    assert read.pop("peak_memory_mb") == pytest.approx(measured.pop("peak_memory_mb"), rel=0.1)
    assert read == measured


def test_a_model_that_takes_no_such_image_has_no_macs(run, monkeypatch):
    def refuse(model, image_size):
        raise InputError("takes clips")

    monkeypatch.setattr("vitarium.efficiency.profiler.count_macs", refuse)
    report = json.loads(run("info", "swin_pico", "--measure", "--json").out)
    assert report["macs"] is report["peak_memory_mb"] is None
    assert run("info", "swin_pico", "--measure").code == 0
    assert json.loads(run("models", "swin_pico", "--macs", "--measure", "--json").out)[0]["macs"] is None


def test_info_of_a_saved_file(run, tmp_path):
    model = vitarium.create_model("convnext_pico", num_classes=3)
    model.labels = ["cat", "dog", "emu"]
    vitarium.save(model, tmp_path / "mine.safetensors")
    report = json.loads(run("info", "mine.safetensors", "--json").out)
    assert report["model"]["name"] == "convnext_pico"
    assert report["model"]["labels"] == ["cat", "dog", "emu"]
    assert "cat, dog, emu" in run("info", "mine.safetensors").out


def test_info_of_a_foreign_file_says_which_model_it_fits(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vitarium.catalog.checkpoints.models_that_fit", lambda weights: ["convnext_pico"])  # it builds every model
    torch.save({"model": vitarium.create_model("convnext_pico").state_dict()}, tmp_path / "theirs.pth")
    report = json.loads(run("info", "theirs.pth", "--json").out)
    assert report["fits"] == ["convnext_pico"]
    assert report["inside"] == ["model"]
    assert "convnext_pico" in run("info", "theirs.pth").out


def test_info_of_what_is_not_there(run):
    assert run("info", "swin_tinny").code == 2
    assert "did you mean swin_tiny" in run("info", "swin_tinny").err
    assert run("info", "gone.safetensors").code == 4
    assert "gone.safetensors" in run("info", "gone.safetensors").err


def test_arguments_are_read_from_docstrings():
    doc = """Title.

    Args:
        depth: number of blocks,
            at least one.
        mean, std: a value a channel.

    Raises:
        ValueError: never.
    """
    assert documented_arguments(doc) == {
        "depth": "number of blocks, at least one.",
        "mean": "a value a channel.",
        "std": "a value a channel.",
    }
    assert documented_arguments(None) == {}


def test_env(run):
    report = json.loads(run("env", "--json").out)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["devices"][0]["device"] == "cpu"
    assert report["extras"]["export"]["packages"] == ["onnx", "onnxruntime", "onnxscript"]
    assert "Extras" in run("env").out


def test_env_says_how_to_install_what_is_missing(run, monkeypatch):
    from vitarium.cli import env

    monkeypatch.setattr(env, "version", lambda package: None if package == "onnx" else "1.0")
    shown = run("env").out
    assert "needs onnx" in shown
    assert "pip install 'vitarium[export]'" in shown
