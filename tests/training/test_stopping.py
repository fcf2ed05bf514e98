"""Early stopping: at a step that follows from the history, with the weights of the best evaluation, also after an interruption."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.training.tiny import TinyNet, tiny_data, tiny_net, tiny_recipe
from vitarium.errors import UsageError
from vitarium.training import ClassificationLearner, fit
from vitarium.training.lengths import Stopping
from vitarium.training.stopping import BEST, best_of, is_over


def history(*values):
    return [{"step": 10 * (place + 1), "accuracy": value} for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "over", "best"),
    [
        ((0.1, 0.2, 0.3), 2, 0.0, False, 2),
        ((0.1, 0.3, 0.2, 0.3), 2, 0.0, True, 1),  # an equal one is no improvement, and the first of equals is kept
        ((0.1, 0.3, 0.2), 2, 0.0, False, 1),
        ((0.30, 0.31, 0.32), 2, 0.05, True, 2),  # better, but not by enough to go on; the best one is kept all the same
        ((0.30, 0.33, 0.36), 2, 0.05, False, 2),  # slowly, but more than that since the last improvement
        ((math.nan, math.nan), 2, 0.0, True, None),
        ((math.nan, 0.2), 2, 0.0, False, 1),
    ],
)
def test_the_rule(values, patience, min_delta, over, best):
    stopping = Stopping(patience=patience, min_delta=min_delta)
    assert is_over(history(*values), "accuracy", "max", stopping) is over
    assert best_of(history(*values), "accuracy", "max") == best


def test_a_smaller_loss_is_better():
    entries = [{"loss": value} for value in (3.0, 1.0, 2.0)]
    assert best_of(entries, "loss", "min") == 1
    assert is_over(entries, "loss", "min", Stopping(patience=1))


class Scripted(ClassificationLearner):
    """Its accuracies are given, whatever the model learns."""

    script = (0.2, 0.5, 0.4, 0.45, 0.3, 0.9, 0.9)

    def summary(self, metrics):
        self.calls = getattr(self, "calls", 0) + 1
        return {**super().summary(metrics), "accuracy": self.script[self.calls - 1]}


CHANGES = ("budget.steps=14", "eval_every=2 steps", "stopping={patience: 3 evaluations}")


def test_a_training_stops_at_the_known_step_with_the_best_weights(tmp_path):
    learner, seen = Scripted(tiny_net()), {}
    result = fit(learner, tiny_data(), tiny_recipe(*CHANGES), tmp_path / "run")
    assert (result.steps, result.best_step, result.stopped_early) == (10, 4, True)
    assert result.metrics["accuracy"] == 0.5
    assert [entry["step"] for entry in result.history] == [2, 4, 6, 8, 10]
    whole = ClassificationLearner(tiny_net())
    fit(whole, tiny_data(), tiny_recipe("budget.steps=14", "eval_every=2 steps"), tmp_path / "whole")
    kept = torch.load(tmp_path / "run" / BEST, weights_only=True)
    assert kept["step"] == 4
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, kept["weights"][name])
        seen[name] = torch.equal(tensor, whole.model.state_dict()[name])
    assert not all(seen.values())
    again = Scripted(tiny_net())  # the run has ended: nothing is evaluated, and the result is the same
    assert fit(again, tiny_data(), tiny_recipe(*CHANGES), tmp_path / "run").best_step == 4
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, kept["weights"][name])


def test_an_interrupted_run_stops_where_an_uninterrupted_one_does(tmp_path):
    changes = ("budget.steps=40", "eval_every=2 steps", "stopping={patience: 2}", "optimizer.lr=0.3")
    whole = ClassificationLearner(tiny_net())
    expected = fit(whole, tiny_data(), tiny_recipe(*changes), tmp_path / "whole")
    assert expected.stopped_early

    def cut(step, total_steps):
        if step == 3:
            raise RuntimeError("power cut")

    begun = ClassificationLearner(tiny_net())
    begun.before_step = cut
    with pytest.raises(RuntimeError, match="power cut"):
        fit(begun, tiny_data(), tiny_recipe(*changes), tmp_path / "cut")
    resumed = ClassificationLearner(tiny_net())
    result = fit(resumed, tiny_data(), tiny_recipe(*changes), tmp_path / "cut")
    strip = lambda entries: [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]
    assert json.dumps(strip(result.history)) == json.dumps(strip(expected.history))
    assert (result.steps, result.best_step) == (expected.steps, expected.best_step)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])


def test_lost_weights_of_the_best_evaluation_are_a_warning(tmp_path, caplog):
    fit(Scripted(tiny_net()), tiny_data(), tiny_recipe(*CHANGES), tmp_path / "run")
    (tmp_path / "run" / BEST).write_bytes(b"cut off")
    result = fit(Scripted(tiny_net()), tiny_data(), tiny_recipe(*CHANGES), tmp_path / "run")
    assert result.best_step == 10
    assert "the last ones are kept" in caplog.text


def test_phases_of_several_sizes_are_refused(tmp_path):
    recipe = tiny_recipe(*CHANGES, "phases=[{until: 0.5, image_size: 12}]")
    with pytest.raises(UsageError, match="image sizes"):
        fit(ClassificationLearner(TinyNet()), tiny_data(), recipe, tmp_path / "run")
