"""Every registered learner: train, save, evaluate under permuted class names, and use the file as its task does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ray import cloudpickle

import vitarium
from vitarium.catalog.record import training_of
from vitarium.data.image_set import ImageData, View
from vitarium.errors import UsageError
from vitarium.training import find_learner, list_learners
from vitarium.training.learners import learner_of
from vitarium.training.parts import evaluate_in_parts
from vitarium.training.tasks import Task, task_of
from vitarium.verbs.evaluate import evaluate
from vitarium.verbs.opening import open_for
from vitarium.verbs.predict import predict
from vitarium.verbs.train import train

STEPS = ("budget.steps=2", "batch_size=4", "eval_every=1.0", "num_workers=0", "ema=null", "precision=32-true", "schedule={warmup: 0}")
RECIPES: dict[str, tuple[str, list[str], str | None, str | None]] = {
    "classification": ("pico", [], "timm/vit_pico", None),
    "dcgan": ("dcgan", ["objective.samples=8"], None, None),
    "diffusion": ("sit_flow_pico", ["objective.samples=8", "objective.steps=2"], None, None),
    "distillation": ("distillation_pico", ["objective.teacher=CLASSIFIER", "objective.store=STORE"], "timm/vit_pico", None),
    "dit_routing": ("dit_routing_pico", [], None, None),
    "kmax_deeplab": ("kmax_deeplab_pico", ["image_size=32", "objective.samples=16"], None, "scenes:length=24"),
    "kmax_deeplab_instance": ("kmax_deeplab_pico", ["image_size=32", "objective.name=kmax_deeplab_instance"], None, "scenes:length=24"),
    "kmax_deeplab_semantic": ("kmax_deeplab_pico", ["image_size=32", "objective.name=kmax_deeplab_semantic"], None, "scenes:length=24"),
    "linear_probe": ("pico", ["objective.name=linear_probe"], "thorax_mae_pico", None),
    "mae": ("thorax_mae_pico", [], None, "scenes:length=24"),
    "multilabel": ("thorax_mae_finetune_pico", [], None, "scenes:task=thorax,length=40"),
    "multilabel_probe": ("pico", ["objective.name=multilabel_probe"], "thorax_mae_pico", "scenes:task=thorax,length=40"),
    "repa": ("repa_pico", ["objective.samples=8", "objective.steps=2", "objective.encoders=[CLASSIFIER]"], None, None),
    "restoration": ("drct_pico", ["image_size=8"], None, "IMAGES"),
    "sparse_prune": ("sparse_prune_pico", [], None, None),
    "t_tame": ("t_tame_pico", [], "CLASSIFIER", None),
    "token_labelling": ("token_labelling_pico", ["objective.teacher=CLASSIFIER", "image_size=16"], None, "digits"),
    "var": ("var_pico", ["objective.samples=8", "objective.tokenizer=TOKENIZER"], None, None),
    "var_tokenizer": ("var_tokenizer_pico", [], None, None),
    "vpt_proxies": ("vpt_proxies_pico", [], "CLASSIFIER", None),
}
"""Learner -> recipe, changes, model and data of a small training. A learner that is not here fails the test below."""


FILES = {"CLASSIFIER": "classifier.safetensors", "TOKENIZER": "tokenizer.safetensors", "IMAGES": "images"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A saved classifier and a saved tokenizer, for learners that start from one, and a folder of images."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16)
    model.labels = [str(i) for i in range(10)]
    vitarium.save(model, folder / "classifier.safetensors")
    vitarium.save(vitarium.create_model("var_tokenizer_pico"), folder / "tokenizer.safetensors")
    (folder / "images").mkdir()
    for i in range(8):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    return {name: str(folder / file) for name, file in FILES.items()}


def trained(name: str, files: dict[str, str], folder: Path):
    recipe, changes, model, data = RECIPES[name]
    names = {**files, "STORE": str(folder / "store")}
    fill = lambda text: next((text.replace(key, value) for key, value in names.items() if key in text), text)
    return train(
        recipe,
        data and fill(data),
        model=model and fill(model),
        changes=[*STEPS, *map(fill, changes)],
        out=folder / "run",
        val_fraction=0.3,
    )


def test_every_learner_is_here():
    ours = {name for name in list_learners() if find_learner(name).__module__.startswith("vitarium.")}
    assert ours == set(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_round_trip(name: str, files, tmp_path, monkeypatch):
    done = trained(name, files, tmp_path)
    loaded = vitarium.load(done.file)
    record = training_of(loaded)
    assert record.learner.name == name
    assert record.task == done.task.record()
    assert record.data.fingerprint
    task = task_of(loaded)
    assert task == done.task

    source, primary = record.data.source, find_learner(name)(loaded, done_settings(loaded)).primary_metric[0]
    plain = evaluate(done.file, source, val_fraction=0.3, batch_size=4)
    assert plain.metrics[primary] == pytest.approx(done.fit.metrics[primary], abs=1e-4, nan_ok=True)
    check_parts(loaded, source, plain.metrics, monkeypatch)
    opened = Task.open
    monkeypatch.setattr(Task, "open", lambda self, *given, **options: permuted(opened(self, *given, **options)))
    again = evaluate(done.file, source, val_fraction=0.3, batch_size=4)
    monkeypatch.setattr(Task, "open", opened)
    assert_equal_numbers(plain.metrics, again.metrics)
    assert plain.facts()["images"] == again.facts()["images"]
    assert plain._repr_html_().startswith("<table>")

    images = drawings(tmp_path)
    if task.result_kind is None:
        with pytest.raises(UsageError, match="has no answer for a single image"):
            predict(images, done.file)
    else:
        found = predict(images, done.file, output=tmp_path / "answers")
        assert [row["image"] for row in found.rows] == images
        assert not found.broken
        assert (tmp_path / "answers" / "answers.json").is_file()
        predict(images, done.file, output=tmp_path / "answers.csv")
        assert len((tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(images)
    if task.conditions:
        made = loaded.generate(torch.tensor([0, 1]), seed=0)
        assert made.shape[0] == 2
        assert 0 <= made.min() <= made.max() <= 1


def check_parts(model, source, metrics, monkeypatch):
    """Evaluated in parts, by a learner and images that went through pickle as to another machine, a model has the same metrics."""
    monkeypatch.setattr("vitarium.training.parts.PART_BATCHES", 1)
    data, task = open_for(model, source, seed=0, val_fraction=0.3), task_of(model)
    copied = cloudpickle.loads(cloudpickle.dumps((learner_of(model), data.val)))
    if task.mergeable:
        assert_equal_numbers(metrics, task.report(evaluate_in_parts(*copied, batch_size=4), data))
    else:
        with pytest.raises(UsageError, match="evaluate it with the local engine"):
            evaluate_in_parts(*copied, batch_size=4)


def done_settings(model):
    from vitarium.training.learners import learner_class_of

    return learner_class_of(model)[1]


def permuted(data: ImageData) -> ImageData:
    """The same data with its classes in another order."""
    if not data.classes:
        return data
    order = list(np.random.default_rng(0).permutation(len(data.classes)))
    number = {old: new for new, old in enumerate(order)}

    def of(part):
        some = part.targets[0] if len(part.targets) else 0
        if isinstance(some, np.ndarray):
            return View(part, targets=[np.asarray(t)[order] for t in part.targets])
        if hasattr(part[0][1], "labels"):
            return View(part, transform_target=lambda t: replace(t, labels=np.array([number[int(v)] for v in t.labels], np.int64)))
        return View(part, targets=[number[t] for t in part.targets])

    if isinstance(data.train[0][0], list):  # groups of images of one class: what retrieval learns from has no names to match
        return data
    changed = replace(data, train=of(data.train), val=of(data.val), classes=[data.classes[old] for old in order])
    return replace(changed, things=tuple(number[t] for t in data.things)) if getattr(data, "things", ()) else changed


def assert_equal_numbers(a, b, path=""):
    """Equal up to 1e-6 in nested metrics."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_numbers(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal_numbers(one, other, f"{path}[{i}]")
    elif isinstance(a, float) and not math.isnan(a):
        assert a == pytest.approx(b, abs=1e-6), path


def drawings(folder: Path) -> list[str]:
    """Three image files."""
    rng, paths = np.random.default_rng(1), []
    for i in range(3):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths
