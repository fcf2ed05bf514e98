"""Tests of batch norm statistics: trainings that are too short for the running averages are evaluated with estimated ones."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import vitarium
from tests.training.test_fit import Breaks, Crash, crash
from tests.training.tiny import assert_same_weights, tiny_data, tiny_net, tiny_recipe, weights
from vitarium.errors import UsageError
from vitarium.training import ClassificationLearner, fit, load_recipe
from vitarium.training.statistics import batch_norms, too_slow

SLOW = ("batch_norm.momentum=0.001",)


def train(folder, *assignments, net=None, at=(), fault=None):
    recipe = tiny_recipe(*assignments)
    learner = Breaks.create(net or tiny_net(norm=True), tiny_data(), recipe)
    learner.at, learner.fault = tuple(at), fault or Breaks.fault
    return learner, fit(learner, tiny_data(), recipe, folder)


def test_the_rule_compares_the_memory_with_the_training():
    """A training of 2,000 updates suits a momentum of 0.01; with torch's 0.1 running averages are used in any training."""
    slow = nn.BatchNorm2d(4, momentum=0.01)
    assert not too_slow(slow, 2000)
    assert too_slow(slow, 1999)
    assert not too_slow(nn.BatchNorm2d(4), 1)
    assert too_slow(nn.BatchNorm2d(4, momentum=None), 10**9)


def test_maxvit_learns_in_a_short_training(tmp_path, caplog):
    """With its momentum of 0.01 the running averages are those of the first steps, which give 10 % of the digits, the rate of chance."""
    data = vitarium.open_data("digits")
    recipe = load_recipe("pico", ["budget.steps=60", "eval_every=1.0"]).model_copy(update={"image_size": data.image_size})
    learner = ClassificationLearner.create("maxvit_pico", data, recipe)
    assert fit(learner, data, recipe, tmp_path).metrics["accuracy"] > 0.6
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert "momentum 0.01" in said[0]
    assert "60 steps" in said[0]


def test_the_final_statistics_are_those_of_training_images(tmp_path):
    learner, _ = train(tmp_path, *SLOW, "ema=null")
    model, transform = learner.model, learner.transform(None)
    images = torch.stack([transform(tiny_data().train[i][0]) for i in range(96)])
    with torch.no_grad():
        inner = model.conv(images)
    torch.testing.assert_close(model.norm.running_mean, inner.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.norm.running_var, inner.var((0, 2, 3)), rtol=0.1, atol=0
    )  # the mean over batches leaves out their spread


def test_the_moving_average_has_its_own(tmp_path):
    learner, result = train(tmp_path, *SLOW)
    images = torch.stack([learner.transform(None)(tiny_data().train[i][0]) for i in range(96)])
    with torch.no_grad():
        torch.testing.assert_close(learner.model.norm.running_mean, learner.model.conv(images).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert vitarium.training.evaluate(learner, tiny_data().val)["accuracy"] == pytest.approx(result.metrics["accuracy"])


def test_evaluations_do_not_change_the_training(tmp_path):
    """A run that is evaluated twelve times ends with the weights of one that is evaluated once."""
    often, _ = train(tmp_path / "often", *SLOW, "eval_every=2 steps")
    once, _ = train(tmp_path / "once", *SLOW, "eval_every=1.0")
    assert_same_weights(weights(often.model), weights(once.model))


@pytest.mark.parametrize("ema", ["null", "{decay: 0.9}"])
def test_resumed_equals_unbroken(tmp_path, ema):
    settings = (*SLOW, f"ema={ema}", "checkpoint_minutes=1e-9")
    whole, result = train(tmp_path / "whole", *settings)
    with pytest.raises(Crash):
        train(tmp_path / "broken", *settings, at=(11,), fault=crash)
    resumed, again = train(tmp_path / "broken", *settings)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert again.metrics == pytest.approx(result.metrics)
    opened, _ = train(tmp_path / "broken", *settings)  # a finished run
    assert_same_weights(weights(whole.model), weights(opened.model))


def test_frozen_norms_keep_their_statistics(tmp_path):
    net = tiny_net(norm=True)
    net.norm.running_mean += 1
    learner, _ = train(tmp_path, *SLOW, "phases=[{freeze: [model.conv, model.norm]}]", "ema=null", net=net)
    assert torch.equal(learner.model.norm.running_mean, torch.ones(8))


def test_the_momentum_is_a_setting_of_the_training(tmp_path):
    """It holds during the training, and the model keeps its own."""
    own, _ = train(tmp_path / "own", "batch_norm.estimate=false", "ema=null", "batch_norm.momentum=1.0")
    usual, _ = train(tmp_path / "usual", "batch_norm.estimate=false", "ema=null")
    assert own.model.norm.momentum == usual.model.norm.momentum == 0.1
    assert not torch.equal(own.model.norm.running_mean, usual.model.norm.running_mean)
    assert torch.equal(own.model.conv.weight, usual.model.conv.weight)


@pytest.mark.parametrize("assignment", ["batch_norm.momentum=0", "batch_norm.momentum=2", "batch_norm.estimate=often", "batch_norm.eps=1"])
def test_wrong_settings_are_named(assignment):
    with pytest.raises(UsageError, match="batch_norm"):
        tiny_recipe(assignment)


def test_a_recipe_without_the_setting_keeps_its_digest():
    assert "batch_norm" not in tiny_recipe().identity()
    assert "batch_norm" in tiny_recipe(*SLOW).identity()


def test_every_model_with_batch_norm_has_a_recorded_momentum():
    """All but MaxViT's are torch's 0.1."""
    momenta = {}
    for name in ("maxvit_pico", "van_pico", "tinyvit_pico", "fmvit_pico", "uniformer_pico", "cvt_pico", "kmax_deeplab_pico"):
        momenta[name] = {norm.momentum for norm in batch_norms(vitarium.create_model(name).train()).values()}
    assert momenta.pop("maxvit_pico") == {0.01}
    assert all(found == {0.1} for found in momenta.values())
