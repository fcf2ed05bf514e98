"""Image sets over lists of samples, and views of them."""

from __future__ import annotations

import pytest

from vitarium.data.image_set import ImageSet, Joined, Samples, Subset, View


def letters(text: str = "abcd", targets: list[int] | None = None) -> Samples:
    return Samples(list(text), targets or [0, 1, 2, 3], read=str.upper, name=lambda letter: f"letter {letter}")


def test_samples_are_read_one_at_a_time_when_asked_for():
    read = []

    def reader(sample):
        read.append(sample)
        return sample.upper()

    images = Samples(["a", "b"], [5, 6], read=reader)
    assert isinstance(images, ImageSet)
    assert (len(images), images.targets, images.describe(1), read) == (2, [5, 6], "b", [])
    assert images[1] == ("B", 6)
    assert read == ["b"]


def test_samples_may_hold_their_targets_themselves():
    pairs = Samples([("a", "b")], read=lambda pair: pair, name=lambda pair: pair[0])
    assert pairs[0] == ("a", "b")
    assert (pairs.targets, pairs.describe(0)) == ([0], "a")


def test_a_view_selects_orders_and_relabels():
    images = letters()
    view = View(images, [3, 1, 1], targets=[7, 8, 9])
    assert [view[i] for i in range(3)] == [("D", 7), ("B", 8), ("B", 9)]
    assert (view.targets, view.describe(0)) == ([7, 8, 9], "letter d")
    assert [Subset(images, [2, 0])[i] for i in range(2)] == [("C", 2), ("A", 0)]
    assert View(images).targets == images.targets


def test_a_view_transforms_targets_as_they_are_read():
    view = View(letters(), [2], transform_target=lambda target: f"class {target}")
    assert view[0] == ("C", "class 2")
    assert view.targets == [2]


def test_targets_of_another_length_are_refused():
    with pytest.raises(ValueError, match="a view of 2 samples"):
        View(letters(), [0, 1], targets=[1])


def test_joined_sets_keep_their_samples_and_names():
    both = Joined([letters(), Samples(["x"], [9], read=str.upper)])
    assert (len(both), both.targets, both[4], both.describe(4)) == (5, [0, 1, 2, 3, 9], ("X", 9), "x")
