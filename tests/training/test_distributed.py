"""Two processes over gloo: the weights and metrics of one process with the double batch; a lost process ends the run with an error
message."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tests.training.test_fit import PLAIN, timeless
from tests.training.tiny import assert_same_weights, tiny_data, tiny_net, tiny_recipe, weights
from vitarium.errors import DataError, TrainingStopped, UsageError
from vitarium.training import ClassificationLearner, fit, processes
from vitarium.training.checkpoint import load_run
from vitarium.training.processes import _StoppedWatch, create_fabric, spawns

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are tested on POSIX")


class Dies(ClassificationLearner):
    """The second process is killed at step 3."""

    def before_step(self, step, total_steps):
        if step == 3 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Complains(Dies):
    """The second process raises an error of ours at step 3."""

    def before_step(self, step, total_steps):
        if step == 3 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise DataError("the second process has something to say")


def train(folder, *assignments, kind=ClassificationLearner, devices=1, progress=None):
    recipe = tiny_recipe(*PLAIN, "budget.steps=7", "num_workers=0", *assignments)
    learner = kind.create(tiny_net(dropout=0.0), tiny_data(), recipe)
    result = fit(learner, tiny_data(), recipe, folder, devices=devices, accelerator="cpu", progress=progress)
    return result, weights(learner.model)


def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    calls = []
    single, expected = train(tmp_path / "one", "batch_size=16")
    double, found = train(tmp_path / "two", "batch_size=8", devices=2, progress=calls.append)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(timeless(double.history), timeless(single.history), strict=True):  # 33 held-out pictures: 17 and 16
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert calls[-1].step == 7
    again, loaded = train(tmp_path / "two", "batch_size=8", devices=2)  # finished: no process is started
    assert replace(again, earlier=0) == double
    assert_same_weights(loaded, found)
    with pytest.raises(UsageError, match="processes: 2 there, 1 now"):
        train(tmp_path / "two", "batch_size=8")


def test_sharded_under_torchrun_equals_one_process(tmp_path):
    """fully_shard over gloo, started from outside; the checkpoint is that of a single device."""
    _, expected = train(tmp_path / "one", "batch_size=16")
    options = [*PLAIN, "budget.steps=7", "num_workers=0", "batch_size=8"]
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.training.tiny"]
    done = subprocess.run([sys.executable, *program, tmp_path / "two", "fsdp", *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    _, tensors = load_run(tmp_path / "two" / "last.ckpt")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(tensors["learner"][f"model.{name}"], found[name])


def test_a_killed_process_ends_the_run_with_a_reason_and_it_can_go_on(tmp_path):
    with pytest.raises(TrainingStopped, match="process"):
        train(tmp_path, "checkpoint_minutes=1e-9", kind=Dies, devices=2)
    assert load_run(tmp_path / "last.ckpt")[0].step == 3


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the states of processes are Linux's")
def test_a_stopped_process_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.2)
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        watch, end = _StoppedWatch(), time.monotonic() + 30
        os.kill(child.pid, signal.SIGSTOP)
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.02)
            watch.look()
        assert f"process {child.pid} is stopped by a signal" in caplog.messages[0]
    finally:
        child.kill()
        child.join()


def test_an_error_in_any_process_comes_out_as_itself(tmp_path):
    with pytest.raises(DataError, match="the second process has something to say"):
        train(tmp_path, kind=Complains, devices=2)


def test_what_cannot_be_sent_to_other_processes_is_told(tmp_path):
    class Local(ClassificationLearner):
        pass

    with pytest.raises(UsageError, match=r"cannot be sent to other processes.*torchrun"):
        train(tmp_path, kind=Local, devices=2)


def test_the_strategy_follows_who_starts_the_processes(monkeypatch):
    assert spawns(create_fabric(2, 1, "auto", "cpu", "32-true"))
    assert not spawns(create_fabric(1, 1, "auto", "cpu", "32-true"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not spawns(create_fabric(2, 1, "auto", "cpu", "32-true"))
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UsageError, match="at least 1"):
        create_fabric(0, 1, "auto", "cpu", "32-true")
    with pytest.raises(UsageError, match=r"cannot use devices=2.*strategy='dpp'"):
        create_fabric(2, 1, "dpp", "cpu", "32-true")
