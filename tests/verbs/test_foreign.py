"""Every verb on a folder in transformers' layout without a classifier, and on the file trained from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitarium
from vitarium.catalog.heads import has_trained_head
from vitarium.errors import UsageError

transformers = pytest.importorskip("transformers")

STEPS = ["budget.steps=2", "batch_size=8", "image_size=16", "num_workers=0", "precision=32-true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A DINOv2 tower's folder, and a folder of images."""
    place = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(place / "dinov2")
    (place / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"images/{i}.png")
    return place


@pytest.fixture(scope="module")
def name(place) -> str:
    return f"hf/{place / 'dinov2'}"


@pytest.fixture(scope="module")
def trained(place, name) -> str:
    found = vitarium.train("pico", "digits", model=name, pretrained=True, changes=STEPS, out=place / "run", accelerator="cpu")
    return str(found.file)


def test_answers_of_a_missing_classifier_are_refused(name, place):
    for ask in (
        lambda: vitarium.predict(place / "images", name),
        lambda: vitarium.explain(place / "images", name, place / "explained"),
        lambda: vitarium.evaluate(name, "digits"),
    ):
        with pytest.raises(UsageError, match=r"has no classifier: its weights hold none; train one .* use probe or index"):
            ask()


def test_features_and_costs_need_no_classifier(name, place):
    probed = vitarium.probe(name, "digits", image_size=8, device="cpu")
    assert probed.linear["accuracy"] > 0.5
    assert vitarium.index(place / "images", name, place / "images.index", device="cpu").numbers == 48
    assert vitarium.export(name, place / "model.pt2", format="torch-export").error < 1e-5
    made = vitarium.compress(name, ["mptq_vit:bits=8"], place / "small.safetensors", data="digits")
    assert made.after["memory_bytes"] < made.before["memory_bytes"]
    assert "accuracy" not in made.after
    assert vitarium.load(place / "small.safetensors").num_classes == 0
    (row,) = vitarium.bench(name, kind="inference", batch=1, rounds=3).rows
    assert (row.model, row.peer, row.image_size) == (name, "", 16)


def test_a_trained_classifier_answers(trained, place):
    assert has_trained_head(vitarium.load(trained))
    assert len(vitarium.predict(place / "images", trained, device="cpu").rows) == 3
    assert 0 <= vitarium.evaluate(trained, "digits", device="cpu").metrics["accuracy"] <= 1
    vitarium.explain(place / "images", trained, place / "explained", device="cpu")
    assert len(list((place / "explained").glob("*.png"))) == 3
    vitarium.export(trained, place / "trained.pt2", format="torch-export")
    assert vitarium.probe(trained, "digits", device="cpu").val == 359


def test_comparisons_train_it(name, place):
    options = dict(steps=2, image_size=16, batch_size=8, pretrained=True, accelerator="cpu")
    found = vitarium.compare("digits", [name], out=place / "compared", **options)
    assert [trial.name for trial in found.trials] == [name]
