"""Loading, probes, methods, explainers and search on real DINOv2-S weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vitarium
from tests.real.conftest import SIZE, agreement, fashion, features_of
from tests.real.dinov2 import hidden_state, load_graph
from vitarium.catalog.methods import list_methods
from vitarium.explanation.explainers import list_explainers

TOKENS = {"evit": "evit:keep=0.9", "pitome": "pitome:keep=0.95", "tome": "tome:r=1"}
QUANTIZERS = {"int8": "int8", "int4w": "int4w", "mptq_vit": "mptq_vit:images=32"}
PRUNERS = {"sparse_prune": "sparse_prune:amount=0.3"}
ADAPTERS = {"lora": "lora", "vpt_proxies": "vpt_proxies"}
LOSS = {**dict.fromkeys(TOKENS, 0.06), "int8": 0.02, "int4w": 0.06, "mptq_vit": 0.03, "sparse_prune": 0.06}
"""Largest loss of nearest-neighbour accuracy on `fashion`, as measured with room for rounding on other machines."""


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_the_weights_are_those_of_the_graph(folder: Path, images: torch.Tensor):
    from transformers import Dinov2Model

    expected = hidden_state(load_graph(), images[:1])
    with torch.inference_mode():
        found = Dinov2Model.from_pretrained(folder).eval()(images[:1]).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 5e-5


def test_three_libraries_give_the_same_features(folder: Path, images: torch.Tensor):
    """transformers itself, its model through ours, and timm's model with the same file; at the size of the position table, where nothing is
    interpolated."""
    from transformers import Dinov2Model

    images = torch.nn.functional.interpolate(images[:1], (518, 518), mode="bilinear")
    with torch.inference_mode():
        reference = Dinov2Model.from_pretrained(folder).eval()(images).last_hidden_state
        wrapped = vitarium.create_model(f"hf/{folder}", pretrained=True).eval().forward_features(images)
        timm = vitarium.create_model("timm/vit_small_patch14_dinov2", checkpoint=str(folder / "model.safetensors"), num_classes=0).eval()
        renamed = timm.forward_features(images)
    scale = reference.std()
    assert (wrapped - reference).abs().max() < 1e-5 * scale
    assert (renamed - reference).abs().max() < 1e-4 * scale
    assert (renamed - reference).abs().mean() < 1e-5 * scale


def test_probes_on_fashion(folder: Path):
    """Features of a model that never saw images of 28 pixels of clothes: 71 % by neighbours and 80 % by regression at 56 pixels."""
    found = vitarium.probe(f"hf/{folder}", "fashion:train=1000,test=500", image_size=SIZE)
    assert found.knn["accuracy"] > 0.69
    assert found.linear["accuracy"] > 0.77


def test_the_lists_below_hold_every_method():
    assert set(list_methods()) == {*TOKENS, *QUANTIZERS, *PRUNERS, *ADAPTERS}


@pytest.mark.parametrize("name", [*TOKENS, *QUANTIZERS, *PRUNERS])
def test_a_method_keeps_the_neighbours(name: str, dinov2: nn.Module, fashion_features):
    """The method runs on real weights, costs no more than a few points, and can be undone."""
    model = copy.deepcopy(dinov2)
    batch = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(batch)
    method = {**TOKENS, **QUANTIZERS, **PRUNERS}[name]
    calibration = fashion()["train"] if name == "mptq_vit" else None
    vitarium.apply(model, calibrated(method, model, calibration))
    changed = {part: features_of(model, images) for part, images in fashion().items()}
    plain = agreement(fashion_features["train"], fashion_features["test"])
    assert agreement(changed["train"], changed["test"]) > plain - LOSS[name]
    vitarium.undo(model)
    with torch.inference_mode():
        assert torch.equal(model(batch), before)


def calibrated(method: str, model: nn.Module, images) -> object:
    """Return a method from its text, with calibration images where it needs them."""
    from vitarium.catalog import preprocessing_of
    from vitarium.catalog.methods import parse_method

    if images is None:
        return parse_method(method)
    from dataclasses import replace

    prepare = preprocessing_of(model)
    return replace(parse_method(method), calibration=[torch.stack([prepare(images[i][0]) for i in range(32)])])  # type: ignore[type-var]


def test_adapters_begin_where_the_model_is(dinov2: nn.Module):
    batch = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for name in ADAPTERS.values():
        model = copy.deepcopy(dinov2)
        report = vitarium.apply(model, name)
        with torch.inference_mode():
            assert torch.isfinite(model(batch)).all(), report
            if name == "lora":
                assert torch.allclose(model(batch), dinov2(batch), atol=1e-5)


@pytest.fixture(scope="module")
def classifier(dinov2: nn.Module, fashion_features, tmp_path_factory) -> str:
    """A file of DINOv2-S with a linear head for `fashion`, fitted on 1,000 features."""
    from sklearn.linear_model import LogisticRegression

    model = copy.deepcopy(dinov2)
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(*(part.numpy() for part in fashion_features["train"]))
    model.reset_classifier(10)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(fitted.coef_))
        model.head.bias.copy_(torch.from_numpy(fitted.intercept_))
    file = tmp_path_factory.mktemp("classifier") / "dinov2.safetensors"
    model.labels = vitarium.open_data("fashion:train=10,test=10").classes
    vitarium.save(model, file)
    return str(file)


def test_a_saved_classifier_is_measured(classifier: str):
    found = vitarium.evaluate(classifier, "fashion:train=10,test=500")
    assert found.metrics["accuracy"] > 0.8


def test_every_explainer_maps_a_photograph(classifier: str, photographs, tmp_path: Path):
    names = [name for name in list_explainers() if name not in ("t_tame",)]
    for name in names:
        found = vitarium.explain(photographs[:1], classifier, tmp_path / name, method=name)
        assert not found.broken, f"{name}: {found.broken}"
        assert any((tmp_path / name).iterdir()), name


def test_search_finds_its_own_kind(folder: Path, photographs, tmp_path: Path):
    """A cut of a photograph finds the photograph."""
    from PIL import Image

    vitarium.index(photographs, f"hf/{folder}", tmp_path / "photos.index")
    cut = tmp_path / "cut.png"
    with Image.open(photographs[6]) as photo:
        photo.crop((20, 20, photo.width - 20, photo.height - 20)).save(cut)
    found = vitarium.search(tmp_path / "photos.index", cut, top_k=3)
    assert photographs[6].name in found.rows[0]["found"][0]["image"]
