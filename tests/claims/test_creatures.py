"""Tests of the images and the measure of DependencyViT's claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitarium
from vitarium.claims.dependencyvit import SIDE, SIZES, Creatures, pruned, purity


def test_creatures_are_where_they_are_said_to_be():
    creatures = Creatures(8, seed=1)
    image, number = creatures.drawn(5)
    assert image.size == (64, 64)
    assert np.array_equal(np.asarray(creatures[5][0]), np.asarray(image))
    assert set(np.unique(number)) in ({0, 1, 2}, {0, 1, 2, 3})
    colourful = np.ptp(np.asarray(image).astype(int), axis=2) > 90
    assert (number[colourful] > 0).all()
    things = creatures.things(5).reshape(8, 8)
    assert set(np.unique(things)) == set(np.unique(number))


def test_purity_of_known_parents():
    things = np.array([[1, 1, 2, 2, 0]])
    mask = torch.zeros(1, 5, 5)
    for child, parent in enumerate([1, 2, 3, 2, 0]):
        mask[0, parent, child] = 1.0
        mask[0, child, child] = 9.0  # oneself is no parent
    found, chance = purity(mask, things)
    assert found == pytest.approx(75)
    assert chance == pytest.approx(25)


def test_the_same_weights_with_half_of_the_tokens():
    torch.manual_seed(0)
    whole = vitarium.create_model("dependencyvit_pico", num_classes=4, image_size=SIDE, **SIZES).eval()
    image = torch.randn(1, 3, SIDE, SIDE)
    for choice in ("received", "chance"):
        *_, last = pruned(whole, choice).eval().forward_stages(image)
        assert last.tokens.shape[1] == 32
