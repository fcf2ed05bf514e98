"""Tests of `train`, `evaluate` and `predict`: from a recipe to a saved file, its metrics and predictions."""

import csv
import errno
import json
import re

import pytest
import torch
from PIL import Image

import vitarium
from vitarium.data import open_data
from vitarium.training.checkpoint import load_run
from vitarium.training.tasks import find_task, parse_task

SHORT = ["--set", "budget.steps=2", "--set", "eval_every=1.0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A saved model for the digits that has learned nothing."""
    torch.manual_seed(0)
    model = vitarium.create_model("timm/resnet_pico", num_classes=10, image_size=16)
    model.labels = list("0123456789")
    path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    vitarium.save(model, path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Three digits, one below another, with a damaged file and a text among them."""
    folder = tmp_path / "pictures ü"
    (folder / "deep").mkdir(parents=True)
    val = open_data("digits").val
    val[0][0].save(folder / "a.png")
    val[1][0].convert("RGB").save(folder / "b.jpg")
    val[2][0].save(folder / "deep" / "c.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    return folder


# ---- train


def test_a_trained_model_is_one_file_with_labels_and_preprocessing(run, tmp_path):
    result = run("train", "pico", "--model", "timm/resnet_pico", *SHORT, "--out", "r")
    assert result.code == 0, result.err
    assert "accuracy" in result.out
    assert "vitarium predict IMAGE --model r" in result.out
    model = vitarium.load(tmp_path / "r" / "model.safetensors")
    assert model.labels == list("0123456789")
    assert model.preprocessing.image_size == 16
    again = run("train", "pico", "--model", "timm/resnet_pico", *SHORT, "--out", "r")
    assert again.code == 0, again.err
    assert again.out == result.out  # the run was finished: its result is told again


def test_without_a_recipe_those_that_fit_are_listed(run):
    result = run("train", "--model", "dit_pico", "--data", "digits")
    assert result.code == 2
    for text in ("a recipe is missing", "sit_flow_pico", "--epochs or --steps, --lr, --batch-size, --image-size"):
        assert text in result.err
    assert "  deit " not in result.err, "of another task"
    assert "  pico " in run("train").err


def test_short_options_change_the_recipe(run, tmp_path):
    options = ["--steps", 2, "--lr", 1e-3, "--batch-size", 16, "--image-size", 12]
    result = run("train", "pico", "--model", "timm/resnet_pico", *options, "--set", "eval_every=1.0", "--out", "r")
    assert result.code == 0, result.err
    state, _ = load_run(tmp_path / "r" / "last.ckpt")
    recipe = state.identity["recipe"]
    assert (state.step, recipe["batch_size"], recipe["image_size"], recipe["optimizer"]["lr"]) == (2, 16, 12, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 2, "--steps", 3], "not both"),
        (
            ["--epochs", 2, "--set", "budget.steps=3"],
            "--epochs is short for --set budget.epochs=..., and --set budget.steps=... is given too",
        ),
        (["--lr", 1e-3, "--set", "optimizer.lr=1e-4"], "--lr is short for --set optimizer.lr"),
        (["--lr", 1e-3, "--set", "optimizer={lr: 1e-4}"], "--set optimizer=... is given too"),
        (["--batch-size", "auto", "--set", "batch_size=4"], "--batch-size is short for"),
        (["--batch-size", "many"], "whole number from 1 up, or auto"),
        (["--epochs", 0], "budget.epochs"),
        (["--log", "tensorbord"], "unknown logger 'tensorbord'; did you mean tensorboard? (loggers: tensorboard, wandb, mlflow"),
        (["--find-lr", "--steps", 5], "leave out --steps"),
        (["--find-lr", "--batch-size", "auto"], "leave out --batch-size auto"),
    ],
)
def test_options_that_contradict_each_other_are_refused(run, tmp_path, options, message):
    result = run("train", "pico", *options, "--out", "r")
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "r").exists()


def test_a_log_has_a_line_per_evaluation_and_ends_with_the_final_metric(run, monkeypatch, tmp_path):
    changes = ["--set", "eval_every=2 steps", "--set", "stopping={patience: 1}", "--steps", 6]
    result = run("train", "pico", "--model", "timm/resnet_pico", *changes, "--out", "r")
    assert result.code == 0, result.err
    history = [json.loads(line) for line in (tmp_path / "r" / "evaluations.jsonl").read_text().splitlines()]
    lines = [line for line in result.err.splitlines() if line.startswith("timm/resnet_pico: ")]
    between = [entry for entry in history if entry["step"] < 6]
    assert len(lines) == 2 + len(between)
    for line, entry in zip(lines[1:], between, strict=False):
        assert f"step {entry['step']}/6, loss " in line
        assert f"accuracy {100 * entry['accuracy']:.1f} %" in line
        assert "left" in line
    best = max(entry["accuracy"] for entry in history)
    assert lines[-1].startswith("timm/resnet_pico: done, step ")
    assert f"accuracy {100 * best:.1f} %" in lines[-1]
    assert "kept" in result.out


def test_a_rate_is_found_and_nothing_is_trained(run, tmp_path):
    result = run("train", "pico", "--model", "timm/resnet_pico", "--find-lr", "--out", "r", "--val-fraction", 0.3)
    assert result.code == 0, result.err
    rate = float(result.out.split()[1])
    assert 1e-5 < rate < 1
    command = f"vitarium train pico --model timm/resnet_pico --val-fraction 0.3 --lr {rate:.2g} --out r"
    assert command in result.out, "the same model on the same data"
    page = (tmp_path / "r" / "find_lr.html").read_text(encoding="utf-8")
    assert command in re.sub(r'<span class="option">(.*?)</span>', r"\1", page)
    assert '<span class="option">--model</span>' in page
    assert re.search(r"the recipe's lr +0.003", result.out)
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["find_lr.html"]
    assert "optimizer.lr" in page
    assert '"vertical":"loss"' in page.replace('": ', '":')


@pytest.mark.parametrize(("size", "said"), [(128, True), (16, False)])
def test_an_input_much_smaller_than_the_images_is_said(run, tmp_path, size, said):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (size, size + number), (60 * number, 0, 0)).save(tmp_path / "images" / label / f"{number}.png")
    given = ["--set", "budget.steps=1", "--set", "batch_size=2", "--set", "num_workers=0", "--out", "r"]
    result = run("train", "pico", "--data", "images", "--model", "timm/resnet_pico", *given)
    if size == 128:
        assert "the model sees 16x16 pixels, and the images have 128x129 (median): a larger input (--image-size 128)" in result.err
    assert ("the model sees" in result.err) is said


def test_training_goes_to_a_folder_of_its_own_by_default(run, tmp_path):
    assert run("train", "pico", "--model", "timm/resnet_pico", "--set", "budget.steps=1").code == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["pico-timm-resnet_pico-digits"]


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_is_saved_where_its_checkpoint_does_not_fit(run, tmp_path, monkeypatch, caplog, fits):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    if not fits:
        monkeypatch.setattr("safetensors.torch.save_file", full)
    result = run("train", "pico", "--model", "timm/resnet_pico", "--steps", 1, "--out", "full")
    assert (tmp_path / "full" / "model.safetensors").exists() == fits
    messages = caplog.text + result.err
    assert messages.count("MB are free") == 1
    assert "training continues" not in messages
    if fits:
        assert result.code == 0, result.err
        assert "full/model.safetensors is complete, but not the run's checkpoint: cannot write full/last.ckpt: No space left" in messages
        assert "steps" in result.out
    else:
        assert result.code == 5
        assert "error: the last checkpoint is not saved: cannot write full/last.ckpt: No space left" in result.err


def test_options_reach_the_training(run, monkeypatch):
    from vitarium.training import FitResult

    got = {}

    def fit(learner, data, recipe, folder, **options):
        got.update(options, recipe=recipe, data=data)
        return FitResult({"accuracy": 0.5}, [], 7, 75.0, [("x.png", "cut off")], skipped=2)

    monkeypatch.setattr("vitarium.training.fitting.fit", fit)
    options = ["--devices", 2, "--num-nodes", 3, "--strategy", "fsdp", "--accelerator", "cuda", "--precision", "bf16-mixed"]
    result = run("train", "pico", "--set", "optimizer.lr=1e-5", "--set", "seed=4", "--val-fraction", 0.5, *options)
    assert result.code == 0, result.err
    assert (got["devices"], got["num_nodes"], got["strategy"], got["accelerator"]) == (2, 3, "fsdp", "cuda")
    recipe = got["recipe"]
    assert (recipe.optimizer.lr, recipe.seed, recipe.precision, recipe.image_size) == (1e-5, 4, "bf16-mixed", 16)
    assert len(got["data"].val) > 800
    assert "50.00 %" in result.out
    assert "7 in 1:15" in result.out
    assert "1 images, listed in" in result.out
    assert "2 steps whose loss" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["piko"], 2, "did you mean pico"),
        (["gone.yaml"], 2, "gone.yaml"),
        ([], 2, "recipe"),
        (["pico", "--set", "optimizer.lrr=1"], 2, "did you mean lr"),
        (["pico", "--set", "optimizer.lr=fast"], 2, "optimizer.lr"),
        (["pico", "--set", "optimizer.lr"], 2, "KEY=VALUE"),
        (["pico", "--precision", "16"], 2, "32-true"),
        (["pico", "--model", "swim_pico"], 2, "did you mean swin_pico"),
        (["pico", "--data", "nowhere"], 3, "nowhere"),
        (["pico", "--checkpoint", "gone.pth"], 4, "gone.pth"),
        (["pico", "--devices", "0"], 2, "--devices"),
    ],
)
def test_training_that_cannot_begin(run, arguments, code, text):
    result = run("train", *arguments)
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err


def test_empty_and_one_class_folders_are_data_errors(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "one" / "cat" / f"{i}.png")
    for data in ("empty", "one"):
        result = run("train", "pico", "--data", data)
        assert result.code == 3
        assert data in result.err


# ---- evaluate


def test_metrics_as_table_json_and_file(run, trained, tmp_path):
    report = json.loads(run("evaluate", trained, "--output", "m.json", "--json").out)
    assert report == json.loads((tmp_path / "m.json").read_text())
    assert 0 <= report["accuracy"] <= 1
    assert report["images"] == sum(c["images"] for c in report["classes"]) == len(open_data("digits").val)
    assert report["broken"] == []
    shown = run("evaluate", trained).out
    assert f"{100 * report['accuracy']:.2f} %" in shown
    assert "Weakest classes" in shown


def test_metrics_are_shown_with_names_and_units():
    texts = find_task("classify")().texts
    assert texts({"accuracy": 0.985, "loss": 0.1, "cost": 0.52}) == {"accuracy": "98.50 %", "cross entropy": "0.1000", "cost": "0.5200"}
    assert parse_task("restore").texts({"psnr": 31.5, "ssim_y": 0.5}) == {"psnr": "31.5000 dB", "ssim y": "0.5000"}


def test_errors_under_corruptions(run, trained, tmp_path, monkeypatch):
    """Of a folder with some of the classes; the table by severity, and JSON."""
    from vitarium.robustness import benchmark

    monkeypatch.setattr(benchmark, "available_kinds", lambda: ["contrast", "shot_noise"])
    val = open_data("digits").val
    for digit in ("3", "7"):
        (tmp_path / "some" / digit).mkdir(parents=True)
        for i in [i for i, target in enumerate(val.targets) if target == int(digit)][:4]:
            val[i][0].save(tmp_path / "some" / digit / f"{i}.png")
    arguments = ("evaluate", trained, "--data", "some", "--val-fraction", 0.5, "--corruptions")
    report = json.loads(run(*arguments, "--json").out)
    found = report["corruptions"]
    assert found["clean_error"] == pytest.approx(1 - report["accuracy"])
    assert {kind: len(errors) for kind, errors in found["errors"].items()} == {"contrast": 5, "shot_noise": 5}
    assert found["mean_corruption_error"] == pytest.approx(sum(found["by_kind"].values()) / 2)
    shown = run(*arguments)
    for words in ("mean corruption error", "shot noise", "Errors by severity"):
        assert words in shown.out
    assert "without frost" in shown.err


def test_classes_are_matched_by_name(run, trained, pictures, tmp_path):
    """A folder that holds only some of the classes, so that its numbers are not the model's."""
    for digit in ("3", "7"):
        (tmp_path / "some" / digit).mkdir(parents=True)
        val = open_data("digits").val
        for i in [i for i, target in enumerate(val.targets) if target == int(digit)][:6]:
            val[i][0].save(tmp_path / "some" / digit / f"{i}.png")
    report = json.loads(run("evaluate", trained, "--data", "some", "--val-fraction", 0.5, "--json").out)
    assert {c["name"]: c["images"] for c in report["classes"] if c["images"]} == {"3": 3, "7": 3}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["gone.safetensors"], 4, "gone.safetensors"),
        (["swim_pico"], 2, "did you mean swin_pico"),
        (["MODEL", "--data", "photos"], 3, "does not know"),
        (["MODEL", "--data", "nowhere"], 3, "nowhere"),
        (["MODEL", "--split", "tst"], 2, "'auto', 'all', 'val', 'test'"),
        (["MODEL", "--split", "test"], 3, "digits has no part test; it has train, val"),
        (["MODEL", "--device", "tpu"], 2, "no device 'tpu'"),
        (["MODEL", "--checkpoint", "x.pth"], 2, "holds its own weights"),
    ],
)
def test_evaluation_that_cannot_begin(run, trained, arguments, code, text):
    result = run("evaluate", *[trained if a == "MODEL" else a for a in arguments])
    assert result.code == code
    assert text in result.err


# ---- predict


def test_pictures_are_named_and_broken_ones_counted(run, trained, pictures):
    result = run("predict", pictures, "gone.png", "--model", trained, "--top-k", 3, "--json")
    assert result.code == 0, result.err
    rows = {row["image"].rpartition("ü/")[2]: row for row in json.loads(result.out)}
    assert list(rows) == ["a.png", "b.jpg", "broken.png", "deep/c.png", "gone.png"]
    shares = [p["probability"] for p in rows["a.png"]["predictions"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert rows["deep/c.png"]["predictions"][0]["label"] in "0123456789"
    assert "predictions" not in rows["broken.png"]
    assert "no such file" in rows["gone.png"]["error"]
    assert "2 of 5 images could not be read" in result.err


def test_predictions_do_not_depend_on_the_batch(run, trained, pictures):
    one, many = (json.loads(run("predict", pictures, "--model", trained, "--batch-size", b, "--json").out) for b in (1, 8))
    for a, b in zip(one, many, strict=True):
        assert a["image"] == b["image"]
        for p, q in zip(a.get("predictions", []), b.get("predictions", []), strict=True):
            assert p["label"] == q["label"]
            assert p["probability"] == pytest.approx(q["probability"], abs=1e-5)


def test_predictions_to_files(run, trained, pictures, tmp_path):
    result = run("predict", pictures, "--model", trained, "--output", "o.csv", "--top-k", 2)
    assert "not readable" in result.out
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label_1", "probability_1", "label_2", "probability_2", "error"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    assert run("predict", pictures, "--model", trained, "-o", "o.json").code == 0
    assert len(json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))) == 4


def test_outputs_that_are_not_finite_are_said(run, trained, pictures, tmp_path):
    model = vitarium.load(trained)
    next(model.parameters()).data.fill_(float("nan"))
    vitarium.save(model, tmp_path / "nan.safetensors")
    result = run("predict", pictures / "a.png", "--model", "nan.safetensors")
    assert result.code == 3
    assert "not finite" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "image"),
        (["a.png"], 2, "--model"),
        (["a.png", "--model", "MODEL", "--output", "o.xlsx"], 2, ".csv or .json"),
        (["a.png", "--model", "MODEL", "--top-k", "0"], 2, "--top-k"),
        (["a.png", "--model", "MODEL"], 3, "no image could be read"),
        (["empty", "--model", "MODEL"], 3, "empty holds no images"),
        (["a.png", "--model", "swim_tiny"], 2, "did you mean swin_tiny"),
        (["a.png", "--model", "gone.safetensors"], 4, "gone.safetensors"),
    ],
)
def test_prediction_that_cannot_begin(run, trained, tmp_path, arguments, code, text):
    (tmp_path / "empty").mkdir()
    result = run("predict", *[trained if a == "MODEL" else a for a in arguments])
    assert result.code == code
    assert text in result.err.lower() or text in result.err


# ---- methods on the way


def test_methods_are_applied_before_anything_is_measured_or_trained(run, tmp_path, pictures):
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16)
    model.labels = list("0123456789")
    vitarium.save(model, tmp_path / "vit.safetensors")
    result = run("evaluate", "vit.safetensors", "--apply", "evit:keep=0.5", "--json")
    assert result.code == 0, result.err
    assert "GMACs" in result.err
    assert json.loads(result.out)["images"] > 300
    assert run("predict", str(pictures / "a.png"), "--model", "vit.safetensors", "--apply", "tome:r=2").code == 0
    result = run("train", "pico", "--apply", "evit:keep=0.5", *SHORT, "--out", "r")
    assert result.code == 0, result.err
    assert [report.method.slug for report in vitarium.load(tmp_path / "r" / "model.safetensors").methods] == ["evit"]


@pytest.mark.parametrize(
    ("method", "message"),
    [("evitt", "unknown method 'evitt'; did you mean evit"), ("evit:kep=1", "did you mean keep"), ("evit:keep=7", "keep")],
)
def test_a_method_that_cannot_be_applied_says_why(run, trained, method, message):
    result = run("evaluate", str(trained), "--apply", method)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_finished_run_says_that_nothing_was_trained(run):
    command = ("train", "pico", "--data", "digits", "--set", "budget.steps=2", "--set", "num_workers=0", "--out", "r")
    first = run(*command)
    assert first.code == 0, first.err
    assert "nothing was trained" not in first.err
    again = run(*command)
    assert again.code == 0, again.err
    assert "r holds a finished run of 2 steps: nothing was trained, and this is its result" in again.err


def test_the_command_with_a_found_rate_repeats_what_was_asked():
    from vitarium.verbs.find_lr import command_with

    weights = dict(model="swin_pico", checkpoint=None, pretrained=True)
    options = dict(batch_size=16, image_size=None, changes=["clip.norm=1"], apply=["evit:keep=0.7"])
    asked = command_with(0.00123, "pico", "my photos/", weights, options)
    rest = "--batch-size 16 --pretrained --set clip.norm=1 --apply evit:keep=0.7 --lr 0.0012"
    assert asked == f"vitarium train pico --data 'my photos/' --model swin_pico {rest}"
    objects = command_with(0.001, object(), None, dict(weights, model=object()), {"out": "my runs/$1", "accelerator": "cpu"})
    assert objects == "vitarium train RECIPE --model MODEL --pretrained --lr 0.001 --out 'my runs/$1' --accelerator cpu"


def test_the_command_to_use_a_model_is_quoted_for_a_shell(run, tmp_path):
    result = run("train", "pico", "--model", "timm/resnet_pico", "--set", "budget.steps=1", "--out", "my $run")
    assert result.code == 0, result.err
    assert "vitarium predict IMAGE --model 'my $run/model.safetensors'" in result.out
    page = (tmp_path / "my $run" / "report.html").read_text(encoding="utf-8")
    assert "model = vitarium.load(&#39;my $run/model.safetensors&#39;)" in page
