"""compare, with tiny budgets: what it writes, what it refuses, what it survives."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitarium
from vitarium.data import BrokenImage, ImageData
from vitarium.errors import DataError, TrainingStopped, UsageError
from vitarium.reports import compare as module
from vitarium.reports.compare import compare
from vitarium.reports.results import Comparison
from vitarium.reports.trial import suitable_threads

MODELS = ["timm/vit_pico", "convnext_iso_pico"]
RECIPE = """
budget: {steps: 12}
batch_size: 16
optimizer: {lr: 1e-3}
ema: {decay: 0.9}
eval_every: 4 steps
checkpoint_minutes: 0.00001
"""


class Squares:
    """Bright and dark squares, two classes; one of them may be broken."""

    def __init__(self, count: int, broken: int | None = None):
        self.targets = [i % 2 for i in range(count)]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.broken:
            raise BrokenImage(self.describe(index), "cut off")
        return Image.new("RGB", (16, 16), (200 * self.targets[index] + index % 50,) * 3), self.targets[index]

    def describe(self, index: int) -> str:
        return f"images/{index}.png"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """Small data that compare finds under any name."""
    data = ImageData("images", Squares(160, broken=7), Squares(40), ["dark", "bright"], 16)
    monkeypatch.setattr(module, "open_data", lambda *_, **__: data)
    return data


def test_writes_numbers_model_and_page(tmp_path, recipe, images):
    events = []
    result = compare("images", MODELS, recipe=recipe, out=tmp_path / "out", progress=events.append)
    saved = json.loads((result.folder / "results.json").read_text())
    assert [m["name"] for m in saved["models"]] == MODELS
    assert saved["classes"] == ["dark", "bright"]
    for row in saved["models"]:
        assert 0 <= row["accuracy"] <= 1
        assert all(row[key] > 0 for key in ("latency_ms", "throughput", "peak_memory_mb", "params", "macs", "seconds"))
        assert row["steps"] == 12
        assert [point["step"] for point in row["history"]] == [4, 8, 12]
        assert sum(map(sum, row["confusion"])) == row["evaluated"] == 40
    assert saved["best"] in MODELS
    assert saved["recommended"] in saved["recommendation"]
    assert saved["bad_files"] == [{"path": "images/7.png", "reason": "cut off"}]
    with open(result.folder / "results.csv", encoding="utf-8") as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(MODELS)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "images/7.png" in page
    best = vitarium.load(result.folder / "best.safetensors")
    assert best.labels == ["dark", "bright"]
    assert best.spec.name == result.best.name
    kinds = [(e.model, e.kind) for e in events if e.kind != "step"]
    assert kinds == [(name, kind) for name in MODELS for kind in ("started", "measuring", "finished")]
    assert all(e.position == MODELS.index(e.model) and e.count == 2 for e in events)


def test_finished_models_are_kept(tmp_path, recipe, images):
    out = tmp_path / "out"
    compare("images", MODELS, recipe=recipe, out=out)
    before = {path: path.read_bytes() for path in out.glob("models/*/*.*")}
    events = []
    again = compare("images", MODELS, recipe=recipe, out=out, progress=events.append)
    assert [e.kind for e in events] == ["kept", "kept"]
    assert {path: path.read_bytes() for path in out.glob("models/*/*.*")} == before
    assert len(again.table()) == 2


def test_further_models_join_a_finished_comparison(tmp_path, recipe, images):
    out, events = tmp_path / "out", []
    first = compare("images", MODELS[:1], recipe=recipe, out=out)
    with pytest.raises(UsageError, match=r"recipe\.seed: 0 there, 1 now"):
        compare("images", MODELS, recipe=recipe, out=out, seed=1)
    both = compare("images", MODELS[::-1], recipe=recipe, out=out, progress=events.append)
    assert [(e.model, e.kind) for e in events if e.kind in ("kept", "finished")] == [(MODELS[0], "kept"), (MODELS[1], "finished")]
    assert [trial.name for trial in both.trials] == MODELS[::-1]
    assert both.trials[1] == first.trials[0]
    assert [m["name"] for m in json.loads((out / "results.json").read_text())["models"]] == MODELS[::-1]
    events.clear()
    compare("images", MODELS[::-1], recipe=recipe, out=out, progress=events.append)
    assert {e.kind for e in events} == {"kept"}
    with pytest.raises(
        UsageError, match=r"choose another folder \(--out\).*models: convnext_iso_pico, timm/vit_pico there, timm/vit_pico now"
    ):
        compare("images", MODELS[:1], recipe=recipe, out=out)


def test_model_that_fails_is_named_and_the_others_continue(tmp_path, recipe, images):
    names = ["timm/vit_small_patch32_224", "timm/vit_pico"]  # patches larger than the images
    result = compare("images", names, recipe=recipe, out=tmp_path / "out")
    assert [t.name for t in result.trials] == ["timm/vit_pico"]
    assert [f.name for f in result.failures] == ["timm/vit_small_patch32_224"]
    assert result.to_dict()["failed"][0]["error"] == result.failures[0].error != ""
    assert Comparison.from_dict(json.loads((result.folder / "results.json").read_text()), result.folder) == result
    assert result.failures[0].error.split("\n")[0] in (tmp_path / "out/results.csv").read_text()
    assert "Traceback" in (tmp_path / "out/models/timm-vit_small_patch32_224/error.txt").read_text()
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "timm/vit_small_patch32_224" in page


def test_models_of_clips_on_images_are_refused_before_training(tmp_path, recipe, images):
    with pytest.raises(UsageError, match=r"images holds single images, and these models take clips: uniformer_video_pico; leave"):
        compare("images", ["timm/vit_pico", "uniformer_video_pico"], recipe=recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "pretrained", "words"),
    [
        (["swin_pico", "swin_tiny", "timm/vit_pico"], True, "no published weights are known of swin_pico, timm/vit_pico; leave"),
        (["swin_pico.in1k", "timm/vit_pico"], False, "no published weights are known of swin_pico.in1k; leave"),
    ],
)
def test_models_without_published_weights_are_refused_at_once(tmp_path, recipe, monkeypatch, names, pretrained, words):
    monkeypatch.setattr(module, "open_data", lambda *_, **__: pytest.fail("the data were opened"))
    with pytest.raises(UsageError) as refused:
        compare("images", names, recipe=recipe, pretrained=pretrained, out=tmp_path / "out")
    assert words in str(refused.value)
    assert "checkpoint=" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_all_models_failing_is_an_error(tmp_path, recipe, images, monkeypatch):
    def stop(*_, **__):
        raise TrainingStopped("loss was not finite")

    monkeypatch.setattr(module, "run_trial", stop)
    with pytest.raises(TrainingStopped, match=r"no model could be compared:\n  timm/vit_pico: loss was not finite"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=tmp_path / "out")


def test_broken_data_stops_all(tmp_path, recipe, monkeypatch):
    class Broken(Squares):
        def __getitem__(self, index):
            raise BrokenImage(self.describe(index), "cut off")

    data = ImageData("images", Broken(160), Broken(40), ["dark", "bright"], 16)
    monkeypatch.setattr(module, "open_data", lambda *_, **__: data)
    with pytest.raises(DataError):
        compare("images", MODELS, recipe=recipe, out=tmp_path / "out")


def test_unknown_names_are_refused_at_once_and_together(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_data", lambda *_, **__: pytest.fail("the names come first"))
    with pytest.raises(UsageError) as error:
        compare(models=["swin_pikco", "timm/vit_tinny", "swin_pico", "swin_pico"], out=tmp_path / "out")
    message = str(error.value)
    assert "swin_pico" in message.split("swin_pikco")[1]
    assert "timm has no model 'vit_tinny'" in message
    assert "'swin_pico' is named twice" in message
    assert not (tmp_path / "out").exists()


def test_data_comes_before_models(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_trial", lambda *_, **__: pytest.fail("no model may be built"))
    with pytest.raises(DataError):
        compare(tmp_path / "nowhere", ["swin_pico"], out=tmp_path / "out")


def test_folder_with_one_class_only_is_refused(tmp_path):
    for name in ("cat", "empty"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i,) * 3).save(tmp_path / f"photos/cat/{i}.png")
    with pytest.raises(DataError):
        compare(tmp_path / "photos", ["timm/vit_pico"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_budget_only():
    with pytest.raises(UsageError, match="one budget, not steps and minutes"):
        compare(models=["swin_pico"], steps=10, minutes=1)


def test_folder_of_another_comparison_is_refused(tmp_path, recipe, images):
    out = tmp_path / "out"
    compare("images", ["timm/vit_pico"], recipe=recipe, out=out)
    before = (out / "results.json").read_bytes()
    with pytest.raises(UsageError, match=r"recipe\.seed: 0 there, 1 now"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=out, seed=1)
    with pytest.raises(UsageError, match="models: timm/vit_pico there, convnext_iso_pico now"):
        compare("images", ["convnext_iso_pico"], recipe=recipe, out=out)
    assert (out / "results.json").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds other files"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=other)


def test_a_folder_in_which_nothing_was_trained_is_taken_over(tmp_path, recipe, images, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="--batch-size 160"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=out, batch_size=200)

    def stop(*_, **__):
        raise TrainingStopped("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_trial", stop)
        with pytest.raises(TrainingStopped):
            compare("images", ["timm/resnet_pico"], recipe=recipe, out=out, seed=3)
    assert (out / "models/timm-resnet_pico/error.txt").exists()
    result = compare("images", ["timm/vit_pico"], recipe=recipe, out=out)
    assert [trial.name for trial in result.trials] == ["timm/vit_pico"]
    assert not (out / "models/timm-resnet_pico/error.txt").exists()
    with pytest.raises(UsageError, match=r"recipe\.batch_size: 16 there, 8 now \(--batch-size\)"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=out, batch_size=8)


def test_a_folder_with_a_checkpoint_is_not_taken_over(tmp_path, recipe, images, monkeypatch):
    def interrupt(event):
        if event.kind == "step" and event.step:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="out was interrupted; the same command continues it"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=out, progress=interrupt)
    with pytest.raises(UsageError, match="holds another run"):
        compare("images", ["timm/vit_pico"], recipe=recipe, out=out, seed=1)


def test_folder_in_use_is_refused(tmp_path, recipe, images):
    from vitarium.files import lock_folder

    with lock_folder(tmp_path / "out"), pytest.raises(UsageError, match="in use"):
        compare("images", MODELS, recipe=recipe, out=tmp_path / "out")


def test_default_folder_continues_the_same_and_leaves_others(tmp_path, recipe, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = compare("images", ["timm/vit_pico"], recipe=recipe)
    again = compare("images", ["timm/vit_pico"], recipe=recipe)
    other = compare("images", ["timm/vit_pico"], recipe=recipe, seed=1)
    assert first.folder == again.folder
    assert other.folder.name == first.folder.name + "-2"


KILLED = """
import os, signal
import torch
from vitarium.reports.compare import compare
from vitarium.reports.results import Comparison
torch.set_num_threads({threads})
def progress(event):
    if event.position == 1 and event.step >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
compare(models={models}, recipe={recipe!r}, out={out!r}, progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_twice_it_ends_as_if_never_killed(tmp_path, recipe):
    """Left once between training and result of the first model, killed once in the middle of the second."""
    out = tmp_path / "killed"

    def leave(event):
        if event.kind == "measuring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(models=MODELS, recipe=recipe, out=out, progress=leave)
    assert not (out / "models/timm-vit_pico/result.json").exists()
    script = KILLED.format(threads=torch.get_num_threads(), models=MODELS, recipe=str(recipe), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    kept = (out / "models/timm-vit_pico/result.json").read_bytes()
    assert not (out / "models/convnext_iso_pico/result.json").exists()

    resumed = compare(models=MODELS, recipe=recipe, out=out)
    unbroken = compare(models=MODELS, recipe=recipe, out=tmp_path / "unbroken")
    assert (out / "models/timm-vit_pico/result.json").read_bytes() == kept
    for a, b in zip(resumed.trials, unbroken.trials, strict=True):
        one, two = (vitarium.load(c.folder / t.file).state_dict() for c, t in ((resumed, a), (unbroken, b)))
        assert all(torch.equal(one[name], two[name]) for name in two)
        assert (a.score, a.metrics, a.steps, a.extras) == (b.score, b.metrics, b.steps, b.extras)
        curves = [[{k: v for k, v in point.items() if k != "seconds"} for point in t.history] for t in (a, b)]
        assert curves[0] == curves[1]


def test_small_models_get_one_thread_and_it_is_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suitable_threads(1_000_000):
            assert torch.get_num_threads() == 1
        with suitable_threads(4_000_000_000):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
