"""Images of several sizes and packed captions in one batch, trained, evaluated and resumed like pairs; workers and processes agree."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.training.captions import FIELDS, Captions, TwoTowers, caption_data, train
from tests.training.test_fit import timeless
from tests.training.tiny import assert_same_weights
from vitarium.data import Sample
from vitarium.data.fields import Collate
from vitarium.data.loader import Loader
from vitarium.errors import DataError
from vitarium.training import evaluate


def loader(**options) -> Loader:
    learner = Captions(TwoTowers())
    return Loader(caption_data().train, learner.transform({}), collate=learner.collate, batch_size=7, seed=3, shuffle=True, **options)


def test_workers_give_the_same_batches_of_every_kind_of_field():
    alone, many = list(loader().epoch(1)), list(loader(num_workers=2).epoch(1))
    assert len(alone) == len(many) == 9
    for a, b in zip(alone, many, strict=True):
        assert list(a) == list(b)
        for name, value in a.items():
            assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
    batch = alone[0]
    assert batch["image"].shape[0] == len(batch["name"]) == 7
    assert len({int(m.sum()) for m in batch["image_mask"]}) > 1  # several sizes
    assert batch["text_cu_seqlens"].tolist()[-1] == len(batch["text"])
    assert not batch["text_present"].all()


def test_it_learns_is_evaluated_and_goes_on_bit_by_bit(tmp_path):
    options = "budget.steps=60", "optimizer.lr=3e-2", "eval_every=20 steps", "checkpoint_minutes=1e-9", "ema=null", "log_every=1"
    result, expected = train(tmp_path / "whole", *options)

    with pytest.raises(RuntimeError, match="at step 17"):
        train(tmp_path / "parts", *options, breaks_at=17)
    again, found = train(tmp_path / "parts", *options)
    assert_same_weights(found, expected)
    assert timeless(again.history) == timeless(result.history)
    model = TwoTowers()
    model.load_state_dict(expected)
    learner = Captions(model)
    assert evaluate(learner, caption_data().train, batch_size=7)["accuracy"] > 0.6  # of eight classes
    assert evaluate(learner, caption_data().val, batch_size=5) == evaluate(learner, caption_data().val, batch_size=5, num_workers=2)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are tested on POSIX")
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    _, expected = train(tmp_path / "one", "batch_size=16", "budget.steps=5", "ema=null")
    _, found = train(tmp_path / "two", "batch_size=8", "budget.steps=5", "ema=null", devices=2)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_wrong_sample_is_named(tmp_path):
    class Wrong:
        targets = [0] * 8

        def __init__(self, sample):
            self.sample = sample

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return Sample(image=torch.zeros(3, 4, 4), target=0, name="x") if index != 5 else self.sample

        def describe(self, index):
            return f"file-{index}"

    def read(sample, **fields):
        return list(Loader(Wrong(sample), lambda s: s, collate=Collate(FIELDS | fields), batch_size=4).epoch(0))

    named = Wrong(None)[0]
    with pytest.raises(DataError, match=r"cannot read sample 5 \(file-5\): .*unknown field 'txt'; did you mean text"):
        read(Sample(named, txt=1, image=torch.zeros(3, 4, 4)))
    with pytest.raises(DataError, match=r"file-5\): .*lacks the field 'name' .*optional=True"):
        read(Sample(image=torch.zeros(3, 4, 4), target=0))
    with pytest.raises(DataError, match=r"file-5\): .*'image' is declared \(3, \*, \*\), got a value of shape \(1, 4, 4\)"):
        read(Sample(named, image=torch.zeros(1, 4, 4)))
    with pytest.raises(DataError, match=r"file-4\): its batch cannot .*'target' has values of the shapes \(\) and \(2\)"):
        read(Sample(named, target=torch.zeros(2)))
