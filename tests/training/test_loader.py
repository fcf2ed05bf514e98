"""Order and augmentation depend only on seed, epoch and index; unreadable samples are reported."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch

from tests.training.tiny import Quadrants
from vitarium.catalog import Preprocessing
from vitarium.data import BadFiles, BrokenImage, workers
from vitarium.data.loader import Loader, seed_generators
from vitarium.errors import DataError


def noisy(picture) -> torch.Tensor:
    """Draws from all three generators."""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 255
    return values + torch.rand(1) + random.random() + float(np.random.rand())


class Faulty(Quadrants):
    """Does something bad at some samples."""

    def __init__(self, count: int, **faults):
        super().__init__(count)
        self.faults = {int(name[1:]): fault for name, fault in faults.items()}
        self.read: list[int] = []

    def __getitem__(self, index):
        self.read.append(index)
        fault = self.faults.get(index)
        if fault == "broken":
            raise BrokenImage(self.describe(index), "truncated")
        if fault == "die":
            os._exit(3)
        if fault == "sleep":
            time.sleep(60)
        if fault == "error":
            raise Unpicklable(lambda: None)
        return super().__getitem__(index)


class Unpicklable(Exception):
    pass


def loader(dataset=None, **options) -> Loader:
    options = {"batch_size": 4, "seed": 7, "shuffle": True, "drop_last": True, **options}
    return Loader(Quadrants(30) if dataset is None else dataset, noisy, **options)


def batches(loader: Loader, epoch: int = 0, start: int = 0) -> list[dict]:
    return list(loader.epoch(epoch, start))


def assert_equal(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(x[key], y[key]) for key in ("image", "target", "index"))


def test_an_epoch_is_a_function_of_seed_and_epoch():
    assert_equal(batches(loader(), 3), batches(loader(), 3))
    orders = {tuple(torch.cat([b["index"] for b in batches(loader(seed=s), e)]).tolist()) for s in (1, 2) for e in (0, 1)}
    assert len(orders) == 4
    first, again = batches(loader(), 0)[0], batches(loader(), 1)
    same = [b["image"][list(b["index"]).index(i)] for b in again for i in first["index"][:1] if i in b["index"]]
    assert not same or not torch.equal(first["image"][0], same[0])  # another epoch, another augmentation


def test_augmentation_does_not_depend_on_the_number_of_workers():
    assert_equal(batches(loader(), 2), batches(loader(num_workers=2), 2))


def test_workers_stay_over_epochs_and_an_epoch_left_early_does_no_harm():
    ours = loader(num_workers=1)
    next(ours.epoch(0))
    assert_equal(batches(ours, 1), batches(loader(), 1))


def test_reading_leaves_the_global_generators_alone():
    seed_generators(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    seed_generators(1)
    batches(loader())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_an_epoch_begins_at_any_step_without_reading_what_is_before():
    dataset = Faulty(30)
    rest = batches(loader(dataset), 1, start=5)
    assert len(dataset.read) == 2 * 4
    assert_equal(rest, batches(loader(), 1)[5:])


def test_ranks_share_the_batches_of_one_process():
    whole = [set(b["index"].tolist()) for b in batches(loader(batch_size=6))]
    ranks = [[set(b["index"].tolist()) for b in batches(loader(batch_size=3, rank=r, world_size=2))] for r in (0, 1)]
    assert [a | b for a, b in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("count", [29, 30, 31])
def test_training_gives_every_rank_the_same_steps_and_evaluation_every_sample_once(count):
    data = Quadrants(count)
    training = [loader(data, rank=r, world_size=3) for r in range(3)]
    assert {len(batches(one)) for one in training} == {count // 12} == {training[0].steps}
    evaluation = [loader(data, rank=r, world_size=3, drop_last=False, shuffle=False) for r in range(3)]
    assert [len(batches(one)) for one in evaluation] == [one.steps for one in evaluation]
    assert sorted(i for one in evaluation for b in batches(one) for i in b["index"].tolist()) == list(range(count))


def test_any_number_of_repeats_takes_the_memory_of_an_epoch():
    (plan, *_) = loader(repeats=10**15).plan(0)
    assert (len(set(plan.indices)), plan.copies) == (1, [0, 1, 2, 3])


def test_repeated_augmentation_gives_copies_that_differ():
    indices = torch.cat([b["index"] for b in batches(loader(repeats=3))])
    images = torch.cat([b["image"] for b in batches(loader(repeats=3))])
    assert len(indices) == 28
    assert indices[0] == indices[1] == indices[2] != indices[3]
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_recorded_and_left_out_and_the_rest_stays_as_it_was(workers):
    bad = BadFiles(limit=0.1)
    found = batches(loader(Faulty(32, _7="broken", _11="broken"), num_workers=workers, bad_files=bad))
    assert sorted(bad.items()) == [("quadrants/11.png", "truncated"), ("quadrants/7.png", "truncated")]
    expected = batches(loader(Quadrants(32)))
    for ours, theirs in zip(found, expected, strict=True):
        kept = [k for k, index in enumerate(theirs["index"].tolist()) if index not in (7, 11)]
        assert torch.equal(ours["image"], theirs["image"][kept])
        assert torch.equal(ours["index"], theirs["index"][kept])


def test_more_broken_images_than_allowed_stop_the_epoch():
    with pytest.raises(DataError, match="2 of 32 images cannot be read"):
        batches(loader(Faulty(32, _7="broken", _11="broken"), bad_files=BadFiles(limit=0.05)))


def test_a_batch_without_a_readable_image_comes_out_empty():
    found = batches(loader(Faulty(4, _0="broken", _1="broken", _2="broken", _3="broken")))
    assert [len(b["index"]) for b in found] == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_another_exception_is_told_with_the_sample_even_if_it_cannot_be_pickled(workers):
    with pytest.raises(DataError, match=r"sample 5 \(quadrants/5.png\): Unpicklable"):
        batches(loader(Faulty(32, _5="error"), num_workers=workers))


def test_a_worker_that_dies_is_told_with_the_sample_it_was_at():
    with pytest.raises(DataError, match=r"1 of 1 data workers died \(exit code 3\) while reading sample 9 \(quadrants/9.png\)"):
        batches(loader(Faulty(32, _9="die"), num_workers=1))


def test_a_worker_that_hangs_is_told_with_the_sample_it_is_at():
    ours = loader(Faulty(32, _9="sleep"), num_workers=1, timeout=1)
    with pytest.raises(DataError, match=r"no batch for 1 seconds while reading sample 9 "):
        batches(ours)


def test_too_little_data_is_refused():
    with pytest.raises(DataError, match="no samples"):
        loader(Quadrants(0))
    with pytest.raises(DataError, match=r"30 training images are fewer than one batch .*use batch_size=15"):
        loader(batch_size=31, world_size=2)


def test_what_is_not_random_is_read_once():
    dataset = Faulty(30)
    plain = Loader(dataset, Preprocessing(8, crop_pct=1.0), batch_size=4)
    first, second = batches(plain, 0), batches(plain, 1)
    assert len(dataset.read) == 30
    assert_equal(first, second)


class Slow(Quadrants):
    """Takes 0.2 seconds for a sample."""

    def __getitem__(self, index):
        time.sleep(0.2)
        return super().__getitem__(index)


def test_a_slow_worker_is_no_stuck_one(caplog):
    assert len(batches(loader(Slow(16), num_workers=1, batch_size=8, timeout=1))) == 2
    assert "no batch for 1 seconds: waiting for the data workers, reading sample" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="states of processes in /proc")
def test_a_stopped_worker_is_told_although_torch_waits_for_its_tensors(monkeypatch, caplog):
    """It has announced batches, whose memory can be fetched only from the process itself."""
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    ours = loader(Quadrants(32), num_workers=1, timeout=1)
    epoch = ours.epoch(0)
    next(epoch)
    time.sleep(0.5)
    (process,) = workers.workers_of(ours._workers)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"no batch for 1 seconds; process \d+ is stopped by a signal"):
        list(epoch)
    assert "is stopped by a signal" in caplog.text
    process.join(5)
    assert process.exitcode == -signal.SIGKILL
