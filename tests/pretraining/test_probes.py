"""Probes: nearest neighbours equal scikit-learn's, and only heads are trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

import vitarium
from tests.training.tiny import tiny_data
from vitarium.data import open_data
from vitarium.errors import DataError, UsageError
from vitarium.pretraining.probes import HeadOnly, LinearProbe, MultilabelProbe, features_of, knn_votes, linear_scores, probe
from vitarium.training import fit, load_recipe


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(4, (count,), generator=generator)
    return centres[targets] + 1.5 * torch.randn(count, 16, generator=generator), targets


@pytest.mark.identity
@pytest.mark.parametrize("neighbours", [1, 5, 20, 500])
def test_uniform_votes_are_scikit_learns(neighbours: int):
    (known, targets), (asked, _) = clusters(300, 1), clusters(100, 2)
    theirs = KNeighborsClassifier(min(neighbours, 300), metric="cosine").fit(known, targets)
    ours = knn_votes(known, F.one_hot(targets, 4), asked, neighbours=neighbours, temperature=None)
    np.testing.assert_allclose(ours, theirs.predict_proba(asked), atol=1e-6)


def test_nearer_neighbours_weigh_more():
    known = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    votes = knn_votes(known, torch.eye(3), torch.tensor([[2.0, 0.0]]), neighbours=2, temperature=0.07)
    near = 1 / (1 + np.exp((0.8 - 1) / 0.07))
    np.testing.assert_allclose(votes[0], [near, 1 - near, 0], atol=1e-6)


def test_linear_scores_of_classes_and_of_labels():
    (known, targets), (asked, truth) = clusters(300, 1), clusters(100, 2)
    scores = linear_scores(known, targets, asked)
    assert (scores.argmax(1) == truth).float().mean() > 0.8
    several = F.one_hot(targets, 5).float()  # the fifth label is never there
    scores = linear_scores(known, several, asked)
    assert scores.shape == (100, 5)
    assert (scores[:, 4] == 0).all()
    assert (scores[:, :4].argmax(1) == truth).float().mean() > 0.8


def test_probe_of_an_autoencoder_and_of_a_classifier():
    data = tiny_data()
    for name in ("thorax_mae_pretrain_pico", "vim_pico"):
        found = probe(vitarium.create_model(name, image_size=8), data, neighbours=5)
        assert found.keys() == {"knn", "linear"}
        assert 0 <= found["knn"]["accuracy"] <= 1
    features, targets = features_of(vitarium.create_model("thorax_mae_pretrain_pico", image_size=8), data.val)
    assert features.shape == (33, 64)
    assert targets.tolist() == data.val.targets


def test_probe_of_several_labels():
    data = open_data("scenes:task=thorax,length=80", task="multilabel", image_size=16)
    found = probe(vitarium.create_model("thorax_mae_pretrain_pico"), data)
    assert found["linear"].keys() == {"auroc", "mean_average_precision"}


def test_refuses():
    with pytest.raises(UsageError, match="does not give features"):
        features_of(nn.Linear(2, 2), tiny_data().val)
    with pytest.raises(DataError, match="no labels to probe with"):
        probe(vitarium.create_model("thorax_mae_pretrain_pico"), open_data("digits", task="image"))


@pytest.mark.parametrize(
    ("kind", "spec", "task"), [(LinearProbe, "digits", "class"), (MultilabelProbe, "scenes:task=thorax,length=100", "multilabel")]
)
def test_only_the_head_learns(kind: type[HeadOnly], spec: str, task: str, tmp_path: Path):
    """By the paper's recipe with LARS: weights of the encoder stay bit for bit, the norm without weights learns its statistics."""
    data = open_data(spec, task=task, image_size=16)
    changes = ["budget.steps=3", "batch_size=16", "image_size=16", "model=thorax_mae_pico", f"objective={{name: {kind.objective}}}"]
    recipe = load_recipe("thorax_mae_probe", [*changes, "precision=32-true", "num_workers=0"])
    learner = kind.create("thorax_mae_pico", data, recipe)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    fit(learner, data, recipe, tmp_path)
    changed = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = {"head_norm.running_mean", "head_norm.running_var", "head_norm.num_batches_tracked"}
    assert changed == {"head.weight", "head.bias"} | statistics
