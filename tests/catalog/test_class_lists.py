"""Class lists beside weights: matched by name, never by count alone, and an assumed order is said."""

from __future__ import annotations

import argparse
import json
import logging

import pytest
import torch
from safetensors.torch import save_file

import vitarium
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.catalog.class_lists import class_list_of
from vitarium.catalog.heads import fresh_names
from vitarium.data.image_set import ImageData, Samples
from vitarium.training.building import build_model
from vitarium.training.opening import load_recipe
from vitarium.training.recipe import Recipe
from vitarium.training.tasks.base import match_classes

TEXT_ORDER = ["0", "1", "10", "11", "2"]
BY_VALUE = ["0", "1", "2", "10", "11"]


def data_of(classes: list[str]) -> ImageData:
    images = Samples([], [], read=lambda _: None)
    return ImageData("data", images, images, classes)


def recipe() -> Recipe:
    return load_recipe("pico", ["image_size=16"])


@pytest.mark.parametrize(
    "content",
    [
        {"class_to_idx": {name: i for i, name in enumerate(TEXT_ORDER)}},
        {"idx_to_class": dict(enumerate(TEXT_ORDER))},
        {"id2label": {str(i): name for i, name in enumerate(TEXT_ORDER)}},
        {"classes": TEXT_ORDER},
        {"meta": {"CLASSES": tuple(TEXT_ORDER)}},
        {"args": argparse.Namespace(class_names=TEXT_ORDER)},
        {"class_to_idx": json.dumps({name: i for i, name in enumerate(TEXT_ORDER)})},
    ],
    ids=lambda content: next(iter(content)),
)
def test_the_usual_forms_are_read(content, tmp_path):
    assert class_list_of(content) == TEXT_ORDER
    assert class_list_of({"state_dict": {}, **content}) == TEXT_ORDER


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"classes": 5},
        {"classes": []},
        {"classes": ["a", "a"]},
        {"class_to_idx": {"a": 0, "b": 2}},
        {"class_to_idx": {"a": True}},
        {"class_to_idx": [1]},
        {"class_to_idx": "[" * 10_000},
        {"id2label": {0: "a", 1: "a"}},
        {"meta": {"meta": {"meta": {"meta": {"classes": ["a", "b"]}}}}},
    ],
)
def test_what_is_no_list_is_ignored(content):
    assert class_list_of(content) is None


def head(model) -> torch.Tensor:
    return model.get_classifier().weight.detach().clone()


@pytest.mark.parametrize("form", ["torch", "safetensors", "ours"])
def test_a_checkpoint_of_others_is_matched_by_its_class_list(form, tmp_path):
    """ImageFolder's order in the file, the order by value in the data: training and evaluation both match by name."""
    torch.manual_seed(0)
    theirs = vitarium.create_model("convnext_pico", num_classes=5)
    path = tmp_path / f"theirs.{'pth' if form == 'torch' else 'safetensors'}"
    numbers = {name: i for i, name in enumerate(TEXT_ORDER)}
    if form == "torch":
        torch.save({"state_dict": theirs.state_dict(), "class_to_idx": numbers}, path)
    elif form == "safetensors":
        save_file(theirs.state_dict(), path, {"class_to_idx": json.dumps(numbers)})
    else:
        theirs.labels = TEXT_ORDER
        vitarium.save(theirs, path)
    opened = vitarium.create_model("convnext_pico", checkpoint=path)
    assert opened.labels == TEXT_ORDER
    assert torch.equal(head(opened), head(theirs))
    trained = build_model("convnext_pico", data_of(BY_VALUE), recipe(), checkpoint=str(path))
    assert trained.labels == BY_VALUE
    assert torch.equal(head(trained), head(theirs)[[TEXT_ORDER.index(name) for name in BY_VALUE]])
    assert not fresh_names(trained)


def test_as_many_other_classes_do_not_reuse_a_head(tmp_path, caplog):
    torch.manual_seed(0)
    model = vitarium.create_model("convnext_pico", num_classes=5)
    model.labels = ["cat", "dog", "cow", "hen", "pig"]
    vitarium.save(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "vitarium"):
        trees = data_of(["oak", "elm", "ash", "fir", "yew"])
        other = build_model("convnext_pico", trees, recipe(), checkpoint=str(tmp_path / "m.safetensors"))
    assert "left as it was: the file's 5 classes are others (cat, dog, cow, hen, pig)" in caplog.text
    assert other.labels == ["oak", "elm", "ash", "fir", "yew"]
    assert not torch.equal(head(other), head(model))
    assert fresh_names(other)
    body = {n: t for n, t in model.state_dict().items() if not n.startswith("head")}
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in body.items())


def test_embeddings_of_classes_follow_the_names(tmp_path):
    torch.manual_seed(0)
    model = vitarium.create_model("dit_pico", num_classes=3)
    model.labels = ["a", "b", "c"]
    vitarium.save(model, tmp_path / "m.safetensors")
    table = model.label_embed.weight.detach()
    same = vitarium.create_model("dit_pico", num_classes=3)
    load_checkpoint(same, tmp_path / "m.safetensors", classes=["c", "a", "b"])
    assert torch.equal(same.label_embed.weight, table[[2, 0, 1, 3]])
    other = vitarium.create_model("dit_pico", num_classes=3)
    before = other.label_embed.weight.detach().clone()
    report = load_checkpoint(other, tmp_path / "m.safetensors", classes=["x", "y", "z"])
    assert "others (a, b, c)" in report.head
    assert torch.equal(other.label_embed.weight, before)


def test_an_assumed_order_is_said(tmp_path, caplog):
    model = vitarium.create_model("convnext_pico", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    said = r"assumed to be the data's, in this order: 0, 1, 2, 10, 11; torchvision's ImageFolder numbers them as text (0, 1, 10, 11, 2)"
    with caplog.at_level(logging.WARNING, "vitarium"):
        build_model("convnext_pico", data_of(BY_VALUE), recipe(), checkpoint=str(tmp_path / "m.pth"))
    assert said in caplog.text
    caplog.clear()
    opened = vitarium.create_model("convnext_pico", checkpoint=tmp_path / "m.pth")
    with caplog.at_level(logging.WARNING, "vitarium"):
        match_classes(opened, data_of(BY_VALUE), lambda numbers: numbers.__getitem__)
    assert said in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vitarium"):
        build_model("convnext_pico", data_of(BY_VALUE), recipe())
        build_model("convnext_pico", data_of(["a", "b"]), recipe(), checkpoint=str(tmp_path / "m.pth"))
    assert "are assumed" not in caplog.text
