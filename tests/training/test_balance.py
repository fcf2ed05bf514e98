"""Class weights and balanced sampling, on a set in which one class is rare."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.training.tiny import Quadrants, tiny_data, tiny_net, tiny_recipe
from vitarium.data import open_data
from vitarium.data.image_set import Subset
from vitarium.data.loader import Loader
from vitarium.data.order import balanced, class_numbers
from vitarium.errors import DataError, UsageError
from vitarium.training import ClassificationLearner, fit, load_recipe
from vitarium.training.classification import class_weights

CLASSES = np.array([0] * 70 + [1] * 8 + [2] * 2)


def test_every_class_occurs_equally_often():
    order = balanced(CLASSES, 3, 5)
    assert len(order) == 80
    counts = Counter(CLASSES[order].tolist())
    assert sorted(counts.values()) == [26, 27, 27]
    assert max(Counter(order[CLASSES[order] == 0].tolist()).values()) == 1, "no frequent image twice"
    assert set(Counter(order[CLASSES[order] == 1].tolist()).values()) <= {3, 4}, "rare ones evenly"
    assert np.array_equal(order, balanced(CLASSES, 3, 5))
    assert not np.array_equal(order, balanced(CLASSES, 3, 6))
    assert not np.array_equal(order, balanced(CLASSES, 4, 5))


def test_the_order_is_divided_among_processes_as_that_of_one():
    images = Quadrants(40)
    make = lambda **options: Loader(images, np.asarray, shuffle=True, drop_last=True, balance=True, seed=2, **options)
    whole = [plan.indices for plan in make(batch_size=8).plan(1)]
    parts = [[plan.indices for plan in make(batch_size=4, rank=rank, world_size=2).plan(1)] for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]
    assert [plan.indices for plan in make(batch_size=8).plan(1, start_step=2)] == whole[2:]


@pytest.mark.parametrize("targets", [[0] * 10, [[0, 1], [1, 0]], ["a", "b"]])
def test_data_without_classes_cannot_be_balanced(targets):
    with pytest.raises(DataError, match="balanced sampling"):
        class_numbers(targets)


def test_balanced_weights_are_one_on_average():
    weights = class_weights("balanced", CLASSES.tolist(), ["a", "b", "c"])
    assert torch.allclose(weights, torch.tensor([80 / 210, 80 / 24, 80 / 6]))
    assert float(weights[CLASSES].mean()) == pytest.approx(1.0)
    assert class_weights({"b": 4}, [0, 1], ["a", "b", "c"]).tolist() == [1, 4, 1]
    with pytest.raises(UsageError, match="did you mean dog"):
        class_weights({"dgo": 2}, [0], ["cat", "dog"])


def test_the_loss_is_a_mean_over_images_however_they_are_divided():
    data = tiny_data()
    recipe = tiny_recipe("objective.loss.class_weights={a: 3.0, c: 0.5}", "objective.loss.label_smoothing=0.1")
    learner = ClassificationLearner.create(tiny_net(), data, recipe)
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 2])
    whole = learner.criterion(logits, target)
    halves = (learner.criterion(logits[:3], target[:3]) + learner.criterion(logits[3:], target[3:])) / 2
    assert torch.allclose(whole, halves)
    plain = tiny_recipe("objective.loss.class_weights={a: 3.0, c: 0.5}", "objective.loss.label_smoothing=0.0")
    learner = ClassificationLearner.create(tiny_net(), data, plain)
    factors = torch.tensor([3.0, 1.0, 0.5, 1.0])[target]
    expected = (factors * F.cross_entropy(logits, target, reduction="none")).mean()
    assert torch.allclose(learner.criterion(logits, target), expected)
    assert torch.allclose(learner.criterion(logits, F.one_hot(target, 4).float()), expected), "mixed targets are weighted, too"


def test_balancing_twice_is_refused():
    recipe = tiny_recipe("objective.loss.class_weights=balanced", "sampling=balanced")
    with pytest.raises(UsageError, match="would count twice"):
        ClassificationLearner.create(tiny_net(), tiny_data(), recipe)
    ClassificationLearner.create(tiny_net(), tiny_data(), tiny_recipe("objective.loss.class_weights={a: 2}", "sampling=balanced"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{7: -5}", "loss.class_weights: the factor of class 7 must be a number of 0 or more, got -5"),
        ("{a: yes}", "the factor of class a must be a number of 0 or more, got True"),
        ("balance", "loss.class_weights: takes balanced, or a factor for each"),
        ("7", "takes balanced, or a factor for each"),
    ],
)
def test_weights_that_cannot_be_are_refused_in_one_line(given, message):
    with pytest.raises(UsageError) as error:
        load_recipe("pico", [f"objective.loss.class_weights={given}"]).settings_of(ClassificationLearner)
    assert message in str(error.value)
    assert "literal" not in str(error.value)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="cross_entropy"):
        load_recipe("pico", ["objective.loss={name: binary, class_weights: balanced}"])
    with pytest.raises(UsageError, match="no class is called 'e'"):
        ClassificationLearner.create(tiny_net(), tiny_data(), tiny_recipe("objective.loss.class_weights={e: 2.0}"))
    learner = ClassificationLearner(tiny_net(), tiny_recipe("objective.loss.class_weights=balanced").settings_of(ClassificationLearner))
    with pytest.raises(UsageError, match=r"create\(name, data, recipe\)"):
        learner.criterion(torch.randn(2, 4), torch.tensor([0, 1]))


@pytest.fixture(scope="module")
def imbalanced():
    """Digits in which the training part has few eights."""
    data = open_data("digits")
    eights = [i for i, target in enumerate(data.train.targets) if target == 8]
    rare = {i for i, target in enumerate(data.train.targets) if target != 8} | set(eights[:6])
    return replace(data, train=Subset(data.train, sorted(rare)))


def recall_of_eight(data, folder, *changes):
    steps = ["budget.steps=200", "eval_every=1.0", "image_size=16", "objective.mixing.mixup=0", "ema=null"]
    recipe = load_recipe("pico", [*steps, *changes])
    torch.manual_seed(0)
    learner = ClassificationLearner.create("timm/resnet_pico", data, recipe)
    fit(learner, data, recipe, folder)
    from vitarium.training import evaluate

    row = evaluate(learner, data.val)["confusion_matrix"][8]
    return row[8] / sum(row)


def test_balancing_raises_the_recall_of_a_rare_class(imbalanced, tmp_path):
    plain = recall_of_eight(imbalanced, tmp_path / "plain")
    sampled = recall_of_eight(imbalanced, tmp_path / "sampled", "sampling=balanced")
    weighted = recall_of_eight(imbalanced, tmp_path / "weighted", "objective.loss.class_weights=balanced")
    assert sampled > plain + 0.1, (plain, sampled)
    assert weighted > plain + 0.1, (plain, weighted)
