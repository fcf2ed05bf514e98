"""Fingerprints of training images: recognised after moves and copies, compact, bounded."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from vitarium.catalog.record import ImagesRecord
from vitarium.data import open_data
from vitarium.data.folders import FileImages
from vitarium.training import fingerprints
from vitarium.training.fingerprints import fingerprint_images, trained_among


def folder(path, count: int = 12, seed: int = 0, side: int = 8):
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = path / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(place)
    return files(path)


def files(path) -> FileImages:
    found = sorted(str(p) for p in path.rglob("*.png"))
    return FileImages(found, [0] * len(found))


def test_images_are_recognised_wherever_they_are(tmp_path):
    images = folder(tmp_path / "a")
    record = fingerprint_images(images)
    assert (record.count, record.below) == (12, None)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    (tmp_path / "moved/a/0.png").rename(tmp_path / "moved/a/other.png")
    assert str(trained_among(files(tmp_path / "moved"), record)) == "12 of 12"
    others = folder(tmp_path / "b", seed=1)
    assert str(trained_among(others, record)) == "0 of 12"
    shutil.copy(tmp_path / "a/a/0.png", tmp_path / "b/b/new.png")
    assert str(trained_among(files(tmp_path / "b"), record)) == "1 of 13"


@pytest.mark.parametrize("name", ["digits", "photos", "scenes:length=60"])
def test_images_without_files_are_recognised_by_their_pixels(name):
    data, other = open_data(name, seed=0), open_data(name, seed=1)
    record = fingerprint_images(data.train)
    assert trained_among(data.train, record).trained == len(data.train)
    assert trained_among(data.val, record).trained <= 0.02 * len(data.val)  # a few tiles and scenes are alike
    mixed = trained_among(other.val, record)
    assert mixed.compared == len(other.val)
    assert mixed.trained > 0.5 * len(other.val) if name == "digits" else True


def test_a_large_set_is_sampled_and_its_fingerprint_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "MOST", 40)
    images = folder(tmp_path / "a", 200)
    record = fingerprint_images(images)
    assert record.count == 200
    assert len(record.digests) == 40 * fingerprints.BYTES * 4 // 3
    (tmp_path / "half/a").mkdir(parents=True)
    for i in range(0, 200, 4):
        shutil.copy(tmp_path / f"a/a/{i}.png", tmp_path / "half/a")
    new = folder(tmp_path / "half/x", 50, seed=3)
    both = trained_among(files(tmp_path / "half"), record)
    assert len(new) + 50 == both.images
    assert 30 <= both.estimate <= 70, both
    assert "about" in str(both)
    monkeypatch.undo()
    assert 4 * fingerprints.MOST * fingerprints.BYTES // 3 < 33_000


def test_large_files_are_read_in_part_and_broken_ones_left_out(tmp_path):
    images = folder(tmp_path / "a", 4, side=300)
    record = fingerprint_images(images)
    assert trained_among(images, record).trained == 4
    whole = (tmp_path / "a/a/0.png").read_bytes()
    (tmp_path / "a/a/0.png").write_bytes(whole[:-1] + b"x")
    assert trained_among(images, record).trained == 3
    (tmp_path / "a/a/2.png").unlink()
    assert trained_among(images, record).compared == 3


def test_a_record_without_images_knows_nothing(tmp_path):
    assert str(trained_among(FileImages([], []), ImagesRecord(count=0, digests=""))) == "unknown"
