"""The sparse_prune learner: the penalty in the loss, pruning during training, persistent zeros, and resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitarium
from tests.training.tiny import tiny_data
from vitarium.catalog.record import LearnerRecord, training_of
from vitarium.efficiency.pruning.masks import prunable, sparsity
from vitarium.efficiency.pruning.penalty import AttentionPenalty
from vitarium.efficiency.pruning.sparse_prune import SparsePrune, SparsePruneLearner, make_permanent
from vitarium.errors import TrainingStopped, UnsupportedModel, UsageError
from vitarium.training import Recipe, find_learner, fit, list_recipes, load_recipe
from vitarium.training.learners import learner_of
from vitarium.training.settings import check

DATA = tiny_data()


def recipe(*, steps: int = 12, objective: dict[str, Any] | None = None, **values: Any) -> Recipe:
    base = dict(
        budget={"steps": steps},
        optimizer={"lr": 1e-2},
        batch_size=16,
        image_size=8,
        objective={"name": "sparse_prune", **(objective or {})},
    )
    return check(Recipe, base | values, "recipe")


def learner(given: Recipe) -> SparsePruneLearner:
    arguments = dict(model_arguments=dict(embed_dim=16, depth=2, num_heads=2, patch_size=4))
    made = find_learner("sparse_prune").create("sparse_prune_pico", DATA, given.model_copy(update=arguments))
    assert isinstance(made, SparsePruneLearner)
    return made


def test_the_penalty_is_in_the_loss():
    with_it, without = learner(recipe(objective={"weight": 0.5, "blocks": "all"})), learner(recipe(objective={"weight": 0}))
    batch = {"image": torch.randn(4, 3, 8, 8), "target": torch.tensor([0, 1, 2, 3])}
    losses = with_it.loss(batch)
    with AttentionPenalty(weight=0.5, blocks="all").watch(with_it.model) as term:
        with_it.model(batch["image"])
    torch.testing.assert_close(losses["penalty"], term())
    torch.testing.assert_close(losses["loss"] - losses["penalty"], without.loss(batch)["loss"])
    assert "penalty" not in without.loss(batch)


def test_zeros_rise_to_the_amount_and_stay(tmp_path: Path):
    given = recipe(objective={"amount": 0.7, "begin": 0.2, "end": 0.6}, steps=20)
    trained = learner(given)
    steps = [trained.amount_at(step, 20) for step in range(20)]
    assert steps[3] is None
    assert steps[4] == 0
    assert steps[11] == pytest.approx(0.7)
    assert steps[12] is None
    assert [a for a in steps if a is not None] == sorted(a for a in steps if a is not None)
    fit(trained, DATA, given, tmp_path)
    found = sparsity(trained.model)
    assert found.zeros == round(0.7 * found.total)
    vitarium.save(trained.model, tmp_path / "model.safetensors")
    loaded = vitarium.load(tmp_path / "model.safetensors")
    assert sparsity(loaded) == found
    assert isinstance(loaded.methods[0].method, SparsePrune)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path):
    given = recipe(objective={"amount": 0.5, "begin": 0.0, "end": 0.5}, steps=10)
    whole, stopped, resumed = learner(given), learner(given), learner(given)
    fit(whole, DATA, given, tmp_path / "whole")
    plain_step, calls = stopped.after_step, []

    def stop(step: int, total: int) -> None:
        plain_step(step, total)
        calls.append(step)
        if step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    stopped.after_step = stop  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, TrainingStopped)):
        fit(stopped, DATA, given, tmp_path / "cut")
    assert calls[-1] < 9
    fit(resumed, DATA, given, tmp_path / "cut")
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_pruning_on_the_model_is_held_under_a_moving_average(tmp_path: Path):
    given = recipe(ema={"decay": 0.9}, objective={"weight": 0})
    trained = learner(given)
    vitarium.apply(trained.model, "sparse_prune:structure=2:4", quiet=True)
    zeros = {name: w == 0 for name, w in prunable(trained.model, include=["mlp"]).items()}
    fit(trained, DATA, given, tmp_path)
    assert all(torch.equal(w == 0, zeros[name]) for name, w in prunable(trained.model, include=["mlp"]).items())


def test_smaller_layers_are_trained_as_any(tmp_path: Path):
    given = recipe(steps=3)
    trained = learner(given)
    vitarium.apply(trained.model, "sparse_prune:structure=both", quiet=True)
    fit(trained, DATA, given, tmp_path)
    assert trained.model.blocks[0].attn.num_heads == 1


def test_heads_and_channels_go_on_the_way_and_are_taken_out_afterwards(tmp_path: Path):
    given = recipe(objective={"amount": 0.5, "structure": "both", "end": 0.5})
    trained = learner(given)
    fit(trained, DATA, given, tmp_path)
    model = trained.model.eval()
    with torch.no_grad():
        before = model(torch.ones(1, 3, 8, 8))
        after = make_permanent(model)(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    assert [block.attn.num_heads for block in model.blocks] == [1, 1]
    assert [block.mlp.fc1.out_features for block in model.blocks] == [16, 16]


def test_a_loaded_model_makes_its_learner(tmp_path: Path):
    given = recipe(objective={"amount": 0.5})
    model = learner(given).model
    training_of(model).learner = LearnerRecord(name="sparse_prune", settings={"amount": 0.5})
    vitarium.save(model, tmp_path / "model.safetensors")
    again = learner_of(vitarium.load(tmp_path / "model.safetensors"))
    assert isinstance(again, SparsePruneLearner)
    assert again.settings.amount == 0.5


def test_mistakes_are_refused():
    with pytest.raises(UsageError, match="set ema=null"):
        learner(recipe(ema={"decay": 0.9}, objective={"amount": 0.5}))
    with pytest.raises(UsageError, match="wieght"):
        learner(recipe(objective={"wieght": 1}))
    net = nn.Linear(2, 2)
    net.num_classes = 2  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="no plain vision transformer"):
        SparsePruneLearner(net)
    assert SparsePruneLearner(net, SparsePruneLearner.Settings(weight=0)).loss(
        {"image": torch.ones(3, 2), "target": torch.tensor([0, 1, 0])}
    )


@pytest.mark.parametrize("name", [n for n in list_recipes() if n.startswith("sparse_prune")])
def test_the_recipes_are_valid(name: str):
    given = load_recipe(name)
    assert given.objective["name"] == "sparse_prune"
    assert given.model is not None
