"""Tests of the multi-label learner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from tests.training.tiny import tiny_net, tiny_recipe
from vitarium.data import open_data
from vitarium.errors import DataError, UsageError
from vitarium.training import evaluate
from vitarium.training.multilabel import MultilabelLearner, binary_loss
from vitarium.training.tasks.multilabel import Multilabel


def measured(logits: torch.Tensor, target: torch.Tensor, batches: int = 3) -> dict:
    """The learner's summary for given logits."""
    learner = MultilabelLearner(tiny_net())
    learner.model.labels = ["a", "b", "c", "d"]
    metrics = learner.metrics()
    for some, truth in zip(logits.chunk(batches), target.chunk(batches), strict=True):
        learner.evaluate_batch(lambda image: image, {"image": some, "target": truth}, metrics)
    return learner.summary(metrics)


def test_metrics_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(60, 4, generator=generator), torch.rand(60, 4, generator=generator).round()
    found = measured(logits, target)
    for i, name in enumerate("abcd"):
        assert found[f"auroc_{name}"] == pytest.approx(roc_auc_score(target[:, i], logits[:, i]), abs=1e-6)
        assert found["findings"][i]["average_precision"] == pytest.approx(average_precision_score(target[:, i], logits[:, i]), abs=1e-6)
        assert found["findings"][i]["yes"] == target[:, i].sum()
    assert found["auroc"] == pytest.approx(np.mean([found[f"auroc_{name}"] for name in "abcd"]))
    assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, target).item(), abs=1e-6)


def test_a_label_that_none_or_all_have_is_left_out_of_the_means():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(30, 4, generator=generator), torch.rand(30, 4, generator=generator).round()
    target[:, 1], target[:, 2] = 0, 1
    found = measured(logits, target)
    assert found["findings"][1]["auroc"] is None
    assert found["findings"][2] == {"name": "c", "yes": 30, "no": 0, "auroc": None, "average_precision": None}
    assert found["auroc"] == pytest.approx((found["auroc_a"] + found["auroc_d"]) / 2)


def test_what_is_not_known_neither_teaches_nor_counts():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(40, 4, generator=generator), torch.rand(40, 4, generator=generator).round()
    target[::3, 0] = math.nan
    known = target[:, 0].isfinite()
    found = measured(logits, target)
    assert found["auroc_a"] == pytest.approx(roc_auc_score(target[known, 0], logits[known, 0]), abs=1e-6)
    assert found["findings"][0]["yes"] + found["findings"][0]["no"] == known.sum()
    logits.requires_grad_()
    binary_loss(logits, target).backward()
    assert (logits.grad[::3, 0] == 0).all()
    assert (logits.grad[known, 0] != 0).all()
    assert binary_loss(logits, torch.full_like(target, math.nan)) == 0


def test_trains_on_drawn_xrays_and_answers():
    data = open_data("scenes:task=thorax,length=64", task="multilabel", image_size=16)
    learner = MultilabelLearner.create("vim_pico", data, tiny_recipe("objective={name: multilabel}", "image_size=16"))
    assert learner.model.labels == data.classes
    found = evaluate(learner, data.val)
    assert 0 <= found["auroc"] <= 1
    assert len(found["findings"]) == 4
    (answer,) = learner.task.answers(learner.model, {"image": torch.zeros(1, 3, 16, 16)})
    assert set(answer) == set(data.classes)
    assert list(answer.values()) == sorted(answer.values(), reverse=True)


def test_refuses():
    data = open_data("scenes:task=thorax,length=64", task="multilabel", image_size=16)
    with pytest.raises(UsageError, match=r"mixing is not a setting"):
        MultilabelLearner.create("vim_pico", data, tiny_recipe("objective={name: multilabel, mixing: {mixup: 0.8}}"))
    with pytest.raises(DataError, match="the data has 3 labels per image, the model has 4: class 0"):
        measured(torch.zeros(4, 4), torch.zeros(4, 3), 1)


def test_outputs_that_are_not_finite_are_an_error_and_no_probability():
    """NaN would be no JSON."""
    model = lambda image: torch.tensor([[0.0, float("nan")], [0.0, 2.0]])
    broken, fine = Multilabel().answers(model, {"image": torch.zeros(2, 3, 4, 4)})
    assert broken == {"error": "the model's output is not finite"}
    assert fine == pytest.approx({"class 1": 0.880797, "class 0": 0.5})
