"""Retrieval data: searched classes are not training classes."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from vitarium.data import open_data
from vitarium.data.retrieval import Groups
from vitarium.errors import DataError


def folder(root, classes, count=3):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * number, 10 * i, 0)).save(root / name / f"{i}.png")
    return root


def test_the_second_half_of_the_classes_is_searched():
    data = open_data("digits", task="retrieval")
    assert data.classes == ["0", "1", "2", "3", "4"]
    assert set(data.train.targets) == set(data.val.targets) == set(range(5))
    pictures, target = data.train[0]
    assert (len(pictures), target) == (4, 0)
    assert len(data.val) + len(data.train.images) == 1797
    assert "such as" in data.train.describe(3)
    assert data.val[0][1] == data.val.targets[0]


def test_groups_are_of_one_class_and_drawn_from_pythons_generator(tmp_path):
    data = open_data(str(folder(tmp_path / "pets", ["ant", "bee", "cat", "dog", "emu"])), task="retrieval")
    assert data.classes == ["ant", "bee"]
    assert len(data.val) == 9
    groups = Groups(data.train.images, size=2)
    random.seed(1)
    first = [p.getpixel((0, 0)) for p in groups[0][0]]
    random.seed(1)
    assert first == [p.getpixel((0, 0)) for p in groups[0][0]]
    assert {red for red, _, _ in first} == {0}
    assert len(data.train[0][0]) == 4  # three images: one comes twice


def test_parts_without_a_common_class_are_kept(tmp_path):
    folder(tmp_path / "train", ["a", "b"])
    folder(tmp_path / "test", ["c", "d"])
    data = open_data(str(tmp_path), task="retrieval")
    assert data.classes == ["a", "b"]
    assert len(data.val) == 6


def test_too_few_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="has 3 classes"):
        open_data(str(folder(tmp_path / "few", ["a", "b", "c"])), task="retrieval")
    folder(tmp_path / "apart" / "train", ["a"])
    folder(tmp_path / "apart" / "val", ["c", "d"])
    with pytest.raises(DataError, match="only one class"):
        open_data(str(tmp_path / "apart"), task="retrieval")
