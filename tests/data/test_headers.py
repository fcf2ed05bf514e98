"""Broken files are found before a training, by a rule for the whole data set."""

import os

import pytest
from PIL import Image

from tests.data.test_segments import panoptic
from vitarium.data import BadFiles, headers, open_data
from vitarium.data.headers import check_headers
from vitarium.data.pairs import open_pairs
from vitarium.data.unlabelled import open_images
from vitarium.errors import DataError


def folder(path, count, broken=()):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40), (i, i, i)).save(path / f"{i:02d}.png")
    for i in broken:
        (path / f"{i:02d}.png").write_bytes(b"<html>not found</html>")
    return str(path)


@pytest.mark.parametrize("opened", [open_images, open_pairs])  # pairs repeat nine photographs until an epoch is long enough
def test_a_small_set_may_hold_one_broken_file(tmp_path, opened):
    bad = BadFiles()
    check_headers(opened(folder(tmp_path / "nine", 9, [4])), bad)
    assert [(path[-6:], "HTML" in reason) for path, reason in bad.items()] == [("04.png", True)]
    with pytest.raises(DataError, match=r"2 of 9 images cannot be read \(22.2 %"):
        check_headers(opened(folder(tmp_path / "two", 9, [4, 5])), BadFiles())


def test_the_rule_is_by_data_set_and_a_part_without_any_readable_image_is_refused(tmp_path):
    data = open_images(folder(tmp_path / "ten", 10), val_fraction=0.1)
    (held_out,) = [data.val.describe(i) for i in range(len(data.val))]
    with open(held_out, "wb") as file:
        file.write(b"no image")
    with pytest.raises(DataError, match=r"no image of the held-out part can be read(.|\n)*repair or remove"):
        check_headers(data, BadFiles())
    bad = BadFiles(total=481)  # of 81 held-out ones, say
    for i in range(4):
        bad.record(f"{i}.png", "cut off")
    bad.check(81)
    bad.record("4.png", "cut off")
    with pytest.raises(DataError, match="5 of 481"):
        bad.check(81)


def test_a_large_set_is_looked_at_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "CHECKED_FILES", 8)
    bad = BadFiles()
    check_headers(open_images(folder(tmp_path / "nine", 9, [1, 2, 3])), bad)
    assert not len(bad)


def test_images_of_json_files_and_of_groups_are_looked_at_too(tmp_path):
    panoptic(tmp_path / "coco", "train2017", 40)
    for place in ("train2017/003.jpg", "annotations/panoptic_train2017/005.png"):
        (tmp_path / "coco" / place).write_bytes(b"no image")
    bad = BadFiles(limit=0.1)
    check_headers(open_data(tmp_path / "coco", task="panoptic"), bad)
    assert sorted(os.path.basename(path) for path, _ in bad.items()) == ["003.jpg", "005.png"]
    (tmp_path / "classes").mkdir()
    for kind in "abcd":
        folder(tmp_path / "classes" / kind, 5, [4] if kind == "a" else [])
    bad = BadFiles()
    check_headers(open_data(tmp_path / "classes", task="retrieval"), bad)  # a is a class of the training part, in groups
    assert [os.path.relpath(path, tmp_path / "classes") for path, _ in bad.items()] == [os.path.join("a", "04.png")]
