"""The search for a learning rate and for the largest batch."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import vitarium
from tests.training.tiny import tiny_data, tiny_net, tiny_recipe
from vitarium.errors import DataError, TrainingStopped, UsageError
from vitarium.training import ClassificationLearner, Player
from vitarium.training.batch_finder import FILE, TrainingSteps, Trial, _left_in_container, batch_size_for, best_batch_on_cpu, largest_batch
from vitarium.training.rate_finder import judged, sweep_rates

GIGABYTE = 10**9


# ---- learning rate


def test_the_suggestion_is_where_the_loss_falls_most_steeply():
    rates = [10 ** (-5 + 0.05 * i) for i in range(100)]
    losses = [2.0 - 1.5 / (1 + (1e-2 / rate) ** 2) + 50 * rate**2 for rate in rates]  # falls at 1e-2, rises beyond
    sweep = judged(rates, losses)
    assert 4e-3 < sweep.suggestion < 4e-2
    assert sweep.clear


def test_noise_is_not_called_a_fall():
    noise = np.random.default_rng(0).normal(2.0, 0.5, 100).tolist()
    assert not judged([10 ** (-5 + 0.05 * i) for i in range(100)], noise).clear


def test_a_sweep_leaves_everything_as_it_was():
    learner, data = ClassificationLearner(tiny_net(norm=True)), tiny_data()
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sweep = sweep_rates(learner, data, tiny_recipe(), steps=30)
    assert sweep.rates[0] == pytest.approx(1e-5)
    assert all(a < b for a, b in zip(sweep.rates, sweep.rates[1:], strict=False))
    assert len(sweep.losses) == len(sweep.rates) <= 30
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert sweep_rates(learner, data, tiny_recipe(), steps=30) == sweep, "the same again"


def test_sweeps_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="at least 10 steps"):
        sweep_rates(ClassificationLearner(tiny_net()), tiny_data(), tiny_recipe(), steps=3)
    learner = ClassificationLearner(tiny_net())
    learner.players = lambda: {"one": Player(learner.model.conv), "other": Player(learner.model.head)}
    with pytest.raises(UsageError, match="several players"):
        sweep_rates(learner, tiny_data(), tiny_recipe())


# ---- batch size


class Device:
    """A device with memory for a number of images, like one that reports that it is out of memory."""

    def __init__(self, room: int, seconds=lambda size: 0.01, memory=lambda size: 0):
        self.room, self.seconds, self.memory, self.tried = room, seconds, memory, []

    def __call__(self, size: int) -> Trial:
        self.tried.append(size)
        return Trial(size, size <= self.room, self.seconds(size), self.memory(size))


@pytest.mark.parametrize(
    ("room", "most", "found", "tried"),
    [
        (100, 10_000, 96, [8, 16, 32, 64, 128, 96]),
        (70, 10_000, 64, [8, 16, 32, 64, 128, 96]),
        (3, 10_000, 3, [8, 4, 2, 3]),
        (1, 10_000, 1, [8, 4, 2, 1]),
        (10_000, 50, 50, [8, 16, 32, 50]),
        (10_000, 5, 5, [5]),
    ],
)
def test_the_largest_batch_is_found_by_trial(room, most, found, tried):
    device = Device(room)
    assert largest_batch(device, most).batch_size == found
    assert device.tried == tried


def test_a_model_that_never_fits_is_an_error():
    with pytest.raises(TrainingStopped, match="batch of one image"):
        largest_batch(Device(0), 100)


def test_on_a_cpu_the_batch_grows_while_that_is_faster():
    device = Device(10**6, seconds=lambda size: 0.001 * max(size, 64))  # faster per image up to 64
    choice = best_batch_on_cpu(device, 10_000, 64 * GIGABYTE)
    assert choice.batch_size == 64
    assert device.tried == [8, 16, 32, 64, 128, 256]
    assert choice.reason == "1000 images/s; larger ones are not faster"
    assert best_batch_on_cpu(Device(10**6, seconds=lambda size: 0.01 * size), 10_000, 64 * GIGABYTE).batch_size == 8
    once_slow = Device(10**6, seconds=lambda size: 0.064 if size != 16 else 0.2)  # one slow step does not end the search
    assert best_batch_on_cpu(once_slow, 64, 64 * GIGABYTE).batch_size == 64


def test_on_a_cpu_no_batch_is_tried_that_would_not_fit():
    device = Device(10**6, memory=lambda size: GIGABYTE + size * GIGABYTE // 16)
    choice = best_batch_on_cpu(device, 10_000, 8 * GIGABYTE)
    assert choice.batch_size == 64  # 5 GB; 128 would need 9
    assert max(device.tried) == 64
    assert "128 would need about 9.0 of 8.0 GB" in choice.reason
    with pytest.raises(TrainingStopped, match="batch of 8"):
        best_batch_on_cpu(Device(4), 100, GIGABYTE)


def test_an_allocator_that_fails_is_a_size_that_does_not_fit(monkeypatch):
    learner = ClassificationLearner(tiny_net())
    steps = TrainingSteps(learner, tiny_data(), tiny_recipe(), torch.device("cpu"))
    forward = ClassificationLearner.loss

    def loss(self, batch):
        if len(batch["image"]) > 20:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 3 GiB")
        return forward(self, batch)

    monkeypatch.setattr(ClassificationLearner, "loss", loss)
    assert largest_batch(steps, 90).batch_size == 16
    monkeypatch.setattr(ClassificationLearner, "loss", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        steps(8)


def test_the_batch_is_found_once_and_recorded(tmp_path, monkeypatch):
    learner, data, device = ClassificationLearner(tiny_net()), tiny_data(), torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    found = batch_size_for(tmp_path / "run", learner, data, tiny_recipe("accumulate=1"), device)
    assert 8 <= found.batch_size <= 96
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name])
    record = json.loads((tmp_path / "run" / FILE).read_text())
    (tmp_path / "run" / FILE).write_text(json.dumps({**record, "batch_size": 12}))
    assert batch_size_for(tmp_path / "run", learner, data, tiny_recipe(), device).batch_size == 12
    (tmp_path / "run" / FILE).write_text("{")
    with pytest.raises(DataError, match="delete it"):
        batch_size_for(tmp_path / "run", learner, data, tiny_recipe(), device)


def test_a_run_resumes_with_the_batch_that_was_found(tmp_path, monkeypatch):
    sizes = iter([24, 48])
    monkeypatch.setattr("vitarium.training.batch_finder.best_batch_on_cpu", lambda *_: _choice(next(sizes)))
    call = dict(model="timm/resnet_pico", batch_size="auto", out=tmp_path / "r", changes=["eval_every=1.0"], accelerator="cpu")
    notes = []
    first = vitarium.train("pico", steps=2, notify=notes.append, **call)
    assert "batch_size=24: as given\n" in notes
    again = vitarium.train("pico", steps=2, **call)
    assert again.finished_before
    assert first.fit.metrics == again.fit.metrics


def _choice(size):
    from vitarium.training.batch_finder import BatchChoice

    return BatchChoice(size, "as given")


def test_the_limit_of_a_container_counts(tmp_path):
    assert _left_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert _left_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert _left_in_container(tmp_path) == [450]
