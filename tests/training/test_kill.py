"""Runs that are killed at any time, stopped by a signal or out of disk space resume and end like uninterrupted ones."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_fit import Breaks, lines, timeless, train, weights
from tests.training.tiny import assert_same_weights, tiny_data, tiny_net, tiny_recipe
from vitarium.errors import NotSaved, TrainingStopped, VitariumError
from vitarium.training import fit
from vitarium.training.checkpoint import load_run
from vitarium.training.fitting import fit_saved_or_not

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks of POSIX")
EAGER = "checkpoint_minutes=1e-9"  # a checkpoint after each step, so that many kills hit one


def in_child(work: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """Start `work` in a forked process (everything is imported already); its exit code is that of the command line."""

    def run() -> None:
        os.setsid()  # a group of its own, as a terminal or a scheduler starts one
        torch.set_num_threads(1)  # a forked process must not use its parent's pool
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        try:
            work(*arguments)
        except VitariumError as error:
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    began = time.monotonic()
    result, final = train(folder, EAGER)
    return folder, result, final, time.monotonic() - began


def assert_ends_as(folder: Path, unbroken) -> None:
    expected_folder, expected, final, _ = unbroken
    result, weights = train(folder, EAGER)
    assert_same_weights(weights, final)
    assert lines(folder) == lines(expected_folder)
    assert timeless(result.history) == timeless(expected.history)
    assert list(folder.glob(".*.tmp")) == []


def test_killed_at_twenty_random_points(tmp_path, unbroken):
    """Each time a new process goes on from where the last was killed; the folder begins anew when a run gets through."""
    rng, duration, steps, folder = random.Random(0), unbroken[-1], [], tmp_path / "0"
    for number in range(20):
        child = in_child(train, folder, EAGER)
        child.join(rng.uniform(0.05, 0.5) * duration)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        elif child.exitcode == 0:
            assert_ends_as(folder, unbroken)
            folder = tmp_path / str(number + 1)
        if (folder / "last.ckpt").exists():
            steps.append(load_run(folder / "last.ckpt")[0].step)  # whole, whenever the kill came
    assert len(set(steps)) > 3
    assert_ends_as(folder, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_within_ten_seconds_and_leaves_as_interrupted(tmp_path, unbroken, number):
    """The signal reaches the data workers, too: they must not die of it."""
    child = in_child(train, tmp_path, "num_workers=2", "budget.steps=24")
    deadline = time.monotonic() + 30
    while not (tmp_path / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, number)
    child.join(10)
    assert child.exitcode == 130
    assert 0 < load_run(tmp_path / "last.ckpt")[0].step < 24
    assert_ends_as(tmp_path, unbroken)


def limited(folder: Path) -> None:
    """Go on with no file allowed to grow beyond 2 kB: what a full disk does to a writer."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    train(folder, EAGER)


def test_a_full_disk_does_not_stop_training_but_the_exit_code_tells(tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EAGER, at=[7], fault=lambda _, losses: (signal.raise_signal(signal.SIGTERM), losses)[1])
    before = (tmp_path / "last.ckpt").read_bytes()
    child = in_child(limited, tmp_path)
    child.join(60)
    assert child.exitcode == TrainingStopped.exit_code
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert list(tmp_path.glob(".*.tmp")) == []
    assert_ends_as(tmp_path, unbroken)


def test_a_save_that_fails_once_is_tried_again(tmp_path, unbroken, monkeypatch, caplog):
    real, calls = torch.save, []

    def save(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "save", save)
    train(tmp_path, EAGER)
    assert "No space left on device" in caplog.text
    assert "training continues" in caplog.text
    assert load_run(tmp_path / "last.ckpt")[0].finished


def test_a_full_disk_from_the_beginning_is_reported_as_it_is(tmp_path, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingStopped, match=r"No space left on device.*Then run the same command: it begins again, as there is no"):
        train(tmp_path, EAGER)
    assert "training continues without a checkpoint" in caplog.text
    assert "intact" not in caplog.text


@pytest.fixture
def full(monkeypatch):
    """No checkpoint fits on the disk."""

    def save(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save)


def test_a_disk_that_is_full_at_the_end_is_reported_once(tmp_path, unbroken, full, caplog):
    """Not as a training that continues; the result is in the error, and the learner has the final weights."""
    recipe = tiny_recipe("checkpoint_minutes=60")
    learner = Breaks.create(tiny_net(norm=True), tiny_data(), recipe)
    with pytest.raises(NotSaved) as caught:
        fit(learner, tiny_data(), recipe, tmp_path / "first")
    assert str(caught.value).count("MB are free") == 1
    assert caplog.text == ""
    assert (caught.value.result.steps, caught.value.result.earlier) == (24, 0)
    assert timeless(caught.value.result.history) == timeless(unbroken[1].history)
    assert_same_weights(weights(learner.model), unbroken[2])
    result, error = fit_saved_or_not(learner, tiny_data(), recipe, tmp_path / "second")
    assert result.steps == 24
    assert error.reason.startswith("cannot write ")


def test_of_checkpoints_in_a_row_that_do_not_fit_the_first_is_a_warning(tmp_path, full, caplog):
    with pytest.raises(NotSaved):
        train(tmp_path, EAGER)
    assert caplog.text.count("training continues") == 1


def test_after_an_error_a_state_that_does_not_fit_is_not_called_saved(tmp_path, full, caplog):
    def fault(learner, losses):
        raise ArithmeticError("of a layer")

    with pytest.raises(ArithmeticError):
        train(tmp_path, at=[3], fault=fault)
    assert "the state could not be saved: the last checkpoint is not saved: cannot write " in caplog.text
    assert "resumes from there" not in caplog.text
    assert "training continues without" not in caplog.text


def test_two_runs_at_once_in_one_folder(tmp_path):
    """Exactly one runs; the other leaves with a usage error."""
    children = [in_child(train, tmp_path, "budget.steps=60") for _ in range(2)]
    for child in children:
        child.join(60)
    assert sorted(child.exitcode for child in children) == [0, 2]
