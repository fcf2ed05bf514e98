import subprocess
import sys

import numpy as np
import pytest

from vitarium.data import ImageSet, digits, open_data, photos, stratified_split
from vitarium.errors import DataError, UsageError


def test_digits():
    data = open_data("digits")
    assert (len(data.train), len(data.val)) == (1438, 359)
    assert data.classes == [str(n) for n in range(10)]
    assert data.image_size == 16
    counts = np.bincount(data.val.targets)
    assert counts.min() >= 34, "every class is held out by its share"
    assert {data.train.describe(i) for i in range(1438)}.isdisjoint(data.val.describe(i) for i in range(359))
    image, target = data.train[0]
    assert (image.size, image.mode, target) == ((16, 16), "RGB", data.train.targets[0])
    image.putpixel((0, 0), (255, 0, 0))
    assert data.train[0][0].tobytes() != image.tobytes(), "the stored image is not the caller's to change"
    assert isinstance(data.train, ImageSet)


def test_the_split_is_a_function_of_the_seed():
    one, again, other = (open_data("digits", seed=seed).val for seed in (0, 0, 1))
    assert one.indices == again.indices != other.indices
    assert len(open_data("digits", val_fraction=0.5).val) == pytest.approx(1797 / 2, abs=5)
    assert digits.open_digits().val.indices == one.indices


@pytest.mark.parametrize(("fraction", "val"), [(0.01, 3), (0.5, 10), (0.99, 19)])
def test_every_class_is_in_both_parts(fraction, val):
    targets = [0] * 2 + [1] * 10 + [2] * 10
    train, held_out = stratified_split(targets, fraction, seed=0)
    assert len(held_out) == pytest.approx(val, abs=1)
    assert sorted(train + held_out) == list(range(22))
    for part in (train, held_out):
        assert {targets[i] for i in part} == {0, 1, 2}


def test_sample_photos():
    pictures = dict(photos.sample_photos())
    assert {"china", "flower"} <= set(pictures)
    assert all(image.mode == "RGB" and min(image.size) >= 300 for image in pictures.values())


def test_tiles_of_photos_do_not_overlap():
    data = open_data("photos", image_size=24)
    assert data.image_size == 24
    assert {"china", "flower"} <= set(data.classes)
    assert data.train[0][0].size == (24, 24)
    assert not set(data.train.samples) & set(data.val.samples)
    assert data.val.describe(0) == "{}, column {}, row {}".format(*data.val.samples[0])
    name, column, row = data.val.samples[0]
    photo = dict(photos.sample_photos())[name]
    side = min(photo.size) // photos.TILES
    expected = photo.crop((column * side, row * side, column * side + side, row * side + side)).resize((24, 24))
    assert data.val[0][0].tobytes() == expected.tobytes()


def test_says_what_brings_photographs(monkeypatch):
    monkeypatch.setattr(photos, "FILES", {"china": "no_such_package/china.jpg"})
    photos._installed.cache_clear()
    with pytest.raises(DataError, match=r"pip install 'vitarium\[data\]'"):
        photos.sample_photos()
    photos._installed.cache_clear()


def test_importing_the_room_imports_nothing_heavy():
    code = "import sys, vitarium.data; print([m for m in ('torch', 'numpy', 'PIL', 'sklearn', 'pydantic', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("digits", "class"),
        ("photos", "class"),
        ("photos", "restore"),
        ("scenes", "multilabel"),
        ("scenes", "segment"),
        ("digits", "image"),
        ("digits", "retrieve"),
    ],
)
def test_a_folder_of_the_name_is_asked_for(tmp_path, monkeypatch, name, task):
    """Neither the embedded set nor the user's folder is taken without a question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=rf"write embedded:{name} for the data set, or \.[/\\\\]{name} for the folder"):
        open_data(name, task=task)
    assert len(open_data(f"embedded:{name}", task=task, image_size=32).train) > 1
    with pytest.raises(DataError, match=r"no |does not"):  # the empty folder
        open_data(f"./{name}", task=task)


def test_a_default_is_the_embedded_set(tmp_path, monkeypatch):
    from vitarium.training.tasks.classify import Classify

    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert Classify().open().name == "digits"


def test_names_of_embedded_sets():
    assert len(open_data("embedded:scenes:length=40").train) == 32
    with pytest.raises(UsageError, match=r"no embedded data set 'fashoin' .*; did you mean fashion\? .* fashion, digits, photos, scenes"):
        open_data("embedded:fashoin")
    with pytest.raises(UsageError, match=r"no embedded data set 'photos' has labels of the kind 'panoptic' \(those that have: scenes\)"):
        open_data("embedded:photos", task="segment")
