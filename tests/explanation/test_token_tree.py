"""Dependency trees as explanations, for models with their own trees and for any plain vision transformer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitarium
from tests.explanation.known import images
from vitarium.errors import UnsupportedModel
from vitarium.explanation.explainers import create_explainer, scaled
from vitarium.explanation.heatmap import CAPTION, overlay
from vitarium.explanation.simple import attention_of_blocks
from vitarium.verbs.explain import explain_files


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = vitarium.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ["dependencyvit_pico", "dependencyvit_lite_pico"])
def test_a_model_that_grows_trees_is_asked_for_them(name: str):
    model, image = model_of(name), images()
    maps = create_explainer("token_tree", model)(image)
    for found, tree in zip(maps, model.dependency_trees(image), strict=True):
        row, column = divmod(tree.root, tree.grid[1])
        middle = found[4 * row + 1 : 4 * row + 3, 4 * column + 1 : 4 * column + 3]
        assert middle.mean() > 0.8
        assert found.max() == 1
    assert torch.equal(create_explainer("token_tree", model)(image, 3), maps)


def test_a_plain_transformers_tree_says_who_looks_at_whom():
    model, image = model_of("timm/vit_pico"), images()
    trees = create_explainer("token_tree", model).trees(image)
    with torch.no_grad():
        _, attention = attention_of_blocks(model, image)
    looks = torch.stack(attention).mean(0)[:, 1:, 1:]
    for tree, found in zip(trees, looks, strict=True):
        assert tree.root == int(found.sum(0).argmax())
        child = int(np.flatnonzero(tree.parent != np.arange(len(tree.parent)))[0])
        assert tree.strength[child] == pytest.approx(float(found[child, tree.parent[child]]))


def test_swin_has_no_tree_of_tokens():
    with pytest.raises(UnsupportedModel):
        create_explainer("token_tree", model_of("swin_pico"))


def test_the_command_draws_the_tree(tmp_path: Path):
    file = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(file)
    model = model_of("dependencyvit_pico")
    explain = create_explainer("token_tree", model)
    (row,) = explain_files(model, {"token_tree": explain}, [str(file)], None, tmp_path, 1, measure=False)
    drawn = Image.open(tmp_path / row["explanations"][0]["overlay"])
    assert drawn.size == (1120, 672 + 2 * CAPTION + 4)  # class and method below
    image = model.preprocessing(Image.open(file))[None]
    heat = explain(image)[0]
    torch.testing.assert_close(scaled(heat[None])[0], heat)
    assert overlay(Image.open(file), heat.numpy(), model.preprocessing).size != drawn.size
