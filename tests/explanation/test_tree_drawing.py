"""Drawings of dependency trees."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vitarium.explanation.tree_drawing import draw_tree
from vitarium.ops.token_tree import grow_tree


def test_the_tree_is_drawn_where_the_model_looked():
    weights = np.zeros((6, 6))
    for parent, child, weight in [(0, 1, 0.9), (1, 2, 0.8), (0, 3, 0.7), (0, 4, 0.1), (4, 5, 0.95)]:
        weights[parent, child] = weight
    tree = grow_tree(weights, (2, 3), 8, (15, 22))
    grey = Image.new("RGB", (90, 60), (120, 120, 120))
    drawn = draw_tree(tree, grey, (15, 0, 75, 60))
    assert drawn.size == (1008, 672)
    pixels = np.asarray(drawn).astype(int)
    assert (pixels[:, :160] == 30).all()  # dark outside the box
    assert len(np.unique(pixels[:, 180:820].reshape(-1, 3), axis=0)) > 50
    assert np.abs(pixels[168, 168 + 112] - (215, 30, 50)).max() < 30  # centre of the root's ring
    assert draw_tree(tree, Image.new("RGB", (4000, 20))).width == 1600


def test_a_single_patch_is_drawn():
    assert draw_tree(grow_tree([[0.3]], (1, 1), 16), Image.new("L", (16, 16))).size == (672, 672)
