"""Tests of fit: a resumed run equals an uninterrupted one; errors are reported without loss of state."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.test_loader import Faulty
from tests.training.tiny import assert_same_weights, tiny_data, tiny_net, tiny_recipe, weights
from vitarium.data import open_data
from vitarium.errors import CheckpointError, DataError, TrainingStopped, UsageError
from vitarium.files import lock_folder
from vitarium.training import ClassificationLearner, fit
from vitarium.training import fitting as fitting_module
from vitarium.training.checkpoint import load_run

PLAIN = ("accumulate=1", "mixing={}", "augment={}", "ema=null")


class Breaks(ClassificationLearner):
    """Does something bad at chosen steps; `fault(learner, losses)` gets what `loss` would give."""

    at: tuple[int, ...] = ()
    step = -1
    fault = staticmethod(lambda learner, losses: losses)

    def before_step(self, step, total_steps):
        self.step = step

    def loss(self, batch):
        losses = super().loss(batch)
        return self.fault(self, losses) if self.step in self.at else losses


class Crash(Exception):
    pass


def crash(learner, losses):
    raise Crash


def not_a_number(learner, losses):
    return {"loss": losses["loss"] * math.nan}


def train(folder: Path, *assignments: str, data=None, norm=True, dropout=0.1, at=(), fault=None, progress=None):
    recipe = tiny_recipe(*assignments)
    learner = Breaks.create(tiny_net(norm=norm, dropout=dropout), data or tiny_data(), recipe)
    learner.at, learner.fault = tuple(at), fault or Breaks.fault
    result = fit(learner, data or tiny_data(), recipe, folder, progress=progress)
    return result, weights(learner.model)


def lines(folder: Path, *, timeless: bool = True) -> list[dict]:
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not timeless or "second" not in k} for row in csv.DictReader(file)]


def timeless(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of everything at once: dropout, mixing, augmentation, average, accumulation, batch norm."""
    folder = tmp_path_factory.mktemp("unbroken")
    result, final = train(folder)
    return folder, result, final


@pytest.mark.parametrize("stops", [[1], [4, 5], [9, 17, 23]])
def test_resumed_equals_unbroken(tmp_path, unbroken, stops):
    """Stopped by signals (also in mid-epoch: an epoch has 6 steps), with another number of loader's workers in between."""
    folder, expected, final = unbroken
    for stop in stops:

        def interrupt(learner, losses):
            signal.raise_signal(signal.SIGTERM)
            return losses

        with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {stop + 1} of 24"):
            train(tmp_path, at=[stop], fault=interrupt)
    result, resumed = train(tmp_path, "num_workers=1")
    assert_same_weights(resumed, final)
    assert lines(tmp_path) == lines(folder)
    assert timeless(result.history) == timeless(expected.history)
    assert [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()] == result.history


def test_a_crash_between_checkpoints_repeats_the_steps_after_the_last(tmp_path, unbroken):
    folder, _, final = unbroken
    with pytest.raises(Crash):
        train(tmp_path, "checkpoint_minutes=1e-9", at=[13], fault=crash)  # saves after each step
    state, _ = load_run(tmp_path / "last.ckpt")
    assert state.step == 13
    assert state.total_steps == 24
    _, resumed = train(tmp_path)
    assert_same_weights(resumed, final)
    assert lines(tmp_path) == lines(folder)


def test_a_run_of_version_0_1_0_goes_on(tmp_path):
    """Its checkpoint, of step 10, has one optimizer and one average; the weights are those that version ended with, to 2 % of their way."""
    fixture = Path(__file__).parents[1] / "fixtures" / "run-0.1.0"
    shutil.copy(fixture / "last.ckpt", tmp_path)
    _, at_step_10 = load_run(tmp_path / "last.ckpt")
    result, resumed = train(tmp_path)
    assert result.steps == 24
    start = {name.removeprefix("model."): value for name, value in at_step_10["learner"].items()}
    expected = torch.load(fixture / "weights.pt", weights_only=True)
    names = [name for name, value in expected.items() if value.is_floating_point()]
    moved, wrong = (torch.cat([(expected[n] - other[n]).flatten() for n in names]) for other in (start, resumed))
    assert wrong.square().mean() < 0.02**2 * moved.square().mean()  # processors round differently, and AdamW amplifies it: 0.5 % was seen
    (tmp_path / "last.ckpt").unlink()
    shutil.copy(fixture / "last.ckpt", tmp_path)
    with pytest.raises(UsageError, match=r"holds another run.*recipe.optimizer.lr: 0.01 there, 0.5 now"):
        train(tmp_path, "optimizer.lr=0.5")


def test_a_finished_run_gives_its_result_without_training(tmp_path):
    first, final = train(tmp_path)
    stamp = (tmp_path / "last.ckpt").stat().st_mtime_ns
    again, loaded = train(tmp_path, at=range(24), fault=crash)
    assert replace(again, earlier=0) == first
    assert_same_weights(loaded, final)
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == stamp


def test_the_final_weights_are_the_moving_average(tmp_path):
    _, final = train(tmp_path)
    _, tensors = load_run(tmp_path / "last.ckpt")
    assert_same_weights(final, tensors["averages"]["model"])
    assert not torch.equal(final["head.weight"], tensors["learner"]["model.head.weight"])
    assert "optimizers" not in tensors


def test_accumulation_equals_the_larger_batch(tmp_path):
    options = [o for o in PLAIN if not o.startswith("accumulate")]
    _, small = train(tmp_path / "a", *options, "batch_size=4", "accumulate=4", norm=False, dropout=0.0)
    _, large = train(tmp_path / "b", *options, "batch_size=16", "accumulate=1", norm=False, dropout=0.0)
    for name, tensor in small.items():
        torch.testing.assert_close(tensor, large[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(tmp_path, precision):
    result, final = train(tmp_path, f"precision={precision}", "budget.steps=3")
    assert result.steps == 3
    assert final["head.weight"].dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_epochs_and_minutes_become_steps_once(tmp_path):
    result, _ = train(tmp_path / "epochs", *PLAIN, "budget={epochs: 1.5}")
    assert result.steps == 18
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path / "minutes", *PLAIN, "budget={minutes: 0.005}", at=[0], fault=lambda _, x: (signal.raise_signal(signal.SIGTERM), x)[1]
        )
    planned = load_run(tmp_path / "minutes" / "last.ckpt")[0].total_steps
    assert planned > 0
    result, _ = train(tmp_path / "minutes", *PLAIN, "budget={minutes: 0.005}")
    assert result.steps == planned


def test_measuring_the_speed_leaves_no_trace(tmp_path, monkeypatch):
    options = ["ema={decay: 0.5}", "augment={}"]
    _, expected = train(tmp_path / "steps", *options, "budget={steps: 6}")
    monkeypatch.setattr(fitting_module, "_steps_in", lambda run, seconds, real=fitting_module._steps_in: min(6, real(run, seconds)))
    _, found = train(tmp_path / "minutes", *options, "budget={minutes: 0.1}")
    assert_same_weights(found, expected)


# ---- folders


def test_another_run_in_the_folder_is_refused_with_what_differs(tmp_path):
    train(tmp_path, "budget.steps=2")
    with pytest.raises(UsageError, match=r"holds another run.*recipe.optimizer.lr: 0.01 there, 0.5 now"):
        train(tmp_path, "budget.steps=2", "optimizer.lr=0.5")
    with pytest.raises(UsageError, match=r"differ in training images: 96 there, 80 now; labels of the training images"):
        train(tmp_path, "budget.steps=2", data=tiny_data(80))
    with pytest.raises(UsageError, match=r"shapes of the model's tensors"):
        train(tmp_path, "budget.steps=2", norm=False)


def test_a_folder_in_use_is_refused(tmp_path):
    with lock_folder(tmp_path), pytest.raises(UsageError, match="in use by another run"):
        train(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot use .*file/run as the folder of the run"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "other"])
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    train(tmp_path, "budget.steps=2")
    path = tmp_path / "last.ckpt"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": bytes(content[:-1]), "flip": bytes(content), "other": b"<html>" * 100}[damage])
    with pytest.raises(CheckpointError, match=r"last.ckpt (is cut off|was changed)"):
        train(tmp_path, "budget.steps=2")


# ---- losses that are not finite


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path):
    result, final = train(tmp_path, *PLAIN, at=[5], fault=not_a_number)
    assert result.skipped == 1
    assert result.steps == 24
    assert all(torch.isfinite(tensor).all() for tensor in final.values())


def test_statistics_of_batch_norm_survive_a_step_that_is_left_out(tmp_path):
    def poisoned(learner, losses):
        learner.model.norm.running_mean.data.fill_(math.nan)  # .data: autograd must not notice
        return not_a_number(learner, losses)

    _, final = train(tmp_path, *PLAIN, at=[5, 9], fault=poisoned)
    assert torch.isfinite(final["norm.running_mean"]).all()


def test_three_such_steps_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(TrainingStopped, match=r"3 steps in a row, up to step 7 .*lr .*lower optimizer.lr") as stopped:
        train(tmp_path, "checkpoint_minutes=1e-9", at=range(5, 99), fault=not_a_number)
    assert stopped.value.exit_code == 5
    dump = json.loads(next(tmp_path.glob("not_finite_*.json")).read_text())
    assert [entry["step"] for entry in dump] == [5, 6, 7]
    assert len(dump[0]["indices"]) == 2
    assert len(dump[0]["indices"][0]) == 8
    assert dump[0]["images"][0][0].startswith("quadrants/")
    assert {"lr", "loss", "grad_norm"} <= dump[0].keys()
    state, tensors = load_run(tmp_path / "last.ckpt")
    assert state.step == 7
    assert all(torch.isfinite(t).all() for t in tensors["learner"].values())


# ---- data and memory


def test_broken_images_are_named_in_the_result(tmp_path):
    """By the share of the whole data set, of which two are less than 1 %."""
    data = tiny_data(val=150)
    broken = Faulty(96, _7="broken", _50="broken")
    result, _ = train(tmp_path, "budget={epochs: 2}", data=type(data)("x", broken, data.val, data.classes, 8))
    assert sorted(result.bad_files) == [("quadrants/50.png", "truncated"), ("quadrants/7.png", "truncated")]
    assert (tmp_path / "bad_files.txt").read_text().count("truncated") == 2
    assert result.skipped == 0


def test_too_little_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="fewer than one batch"):
        train(tmp_path, data=tiny_data(7))
    with pytest.raises(DataError, match=r"fewer than one step takes \(16 = .*accumulate=1"):
        train(tmp_path, data=tiny_data(15))
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_do(tmp_path, error):
    def hungry(learner, losses):
        raise error

    with pytest.raises(TrainingStopped, match=r"batch_size=8 with 8 pixels on cpu: try batch_size=4 accumulate=4 \(the same total batch\)"):
        train(tmp_path, at=[0], fault=hungry)


def test_progress_is_told_with_metrics(tmp_path):
    calls = []
    train(tmp_path, *PLAIN, progress=calls.append)
    assert calls[-1].step == calls[-1].total_steps == 24
    assert 0 <= calls[-1].metrics["accuracy"] <= 1
    assert all(a.step <= b.step for a, b in itertools.pairwise(calls))


# ---- data in another place


def folder_data(path: Path, count: int = 20) -> Path:
    """Write a folder of two classes."""
    for label, value in (("dark", 40), ("light", 210)):
        (path / label).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(-30, 30, (8, 8, 3))
            Image.fromarray((value + noise).astype(np.uint8)).save(path / label / f"{i:02d}.png")
    return path


def test_a_run_resumes_with_its_data_under_any_spelling_and_elsewhere(tmp_path, monkeypatch):
    """Relative and absolute, from another working folder, and moved under another name."""
    folder_data(tmp_path / "few")
    monkeypatch.chdir(tmp_path)
    begin = lambda spec: train(tmp_path / "run", "budget.steps=2", data=open_data(spec))[0].history
    first = begin("few")
    assert begin("./few/") == first
    assert begin(str(tmp_path / "few")) == first
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert begin("../few") == first
    (tmp_path / "few").rename(tmp_path / "moved")
    assert begin("../moved") == first
    (tmp_path / "moved/dark/00.png").rename(tmp_path / "moved/dark/0.png")
    with pytest.raises(UsageError, match=r"differ in first training image: dark/00.png there, dark/0.png now|names of the"):
        begin("../moved")


def test_an_evaluation_that_fails_after_the_training_leaves_a_checkpoint(tmp_path, unbroken):
    """The run then goes on with the evaluation, and ends like an unbroken one."""
    _, expected, final = unbroken
    data = tiny_data()
    failing = type(data)(data.name, data.train, Faulty(33, _5="error"), data.classes, 8)
    failing.val.pictures, failing.val.targets = data.val.pictures, data.val.targets
    with pytest.raises(DataError, match="cannot read sample 5"):
        train(tmp_path, "eval_every=24 steps", data=failing)
    state, _ = load_run(tmp_path / "last.ckpt")
    assert (state.step, state.evaluated, state.finished) == (24, -1, False)
    result, weights = train(tmp_path, "eval_every=24 steps", at=range(24), fault=crash)
    assert_same_weights(weights, final)
    assert result.metrics["accuracy"] == expected.metrics["accuracy"]


def test_a_step_that_fails_leaves_a_checkpoint_of_the_step_before(tmp_path, unbroken):
    _, _, final = unbroken
    with pytest.raises(Crash):
        train(tmp_path, at=[9], fault=crash)
    assert load_run(tmp_path / "last.ckpt")[0].step == 9
    assert_same_weights(train(tmp_path)[1], final)
