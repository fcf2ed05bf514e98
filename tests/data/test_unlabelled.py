"""Images without labels."""

import pytest
from PIL import Image

from vitarium.data import open_data
from vitarium.errors import DataError, UsageError


def fill(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name)


def test_a_flat_folder_is_split_by_the_seed(tmp_path):
    fill(tmp_path / "a", [f"{i}.png" for i in range(7)])
    fill(tmp_path / "a" / "deeper", [f"{i}.jpg" for i in range(3)])
    data = open_data(tmp_path / "a", task="image")
    assert (len(data.train), len(data.val), data.classes) == (8, 2, [])
    names = [part.describe(i) for part in (data.train, data.val) for i in range(len(part))]
    assert len(set(names)) == 10
    assert data.train[0][1] == 0
    again = open_data(tmp_path / "a", task="image")
    assert [again.val.describe(i) for i in range(2)] == [data.val.describe(i) for i in range(2)]


def test_train_and_val_folders_are_kept_apart(tmp_path):
    fill(tmp_path / "train", ["a.png", "b.png"])
    fill(tmp_path / "val", ["c.png"])
    data = open_data(tmp_path, task="image")
    assert (len(data.train), len(data.val)) == (2, 1)


def test_labels_of_other_data_are_left_aside():
    data = open_data("digits", task="image")
    assert data.classes == []
    assert data.image_size == 16
    assert set(data.train.targets) == {0} == {data.val[3][1]}
    assert "digit" in data.val.describe(0)


def test_too_little_says_what_is_needed(tmp_path):
    fill(tmp_path, ["a.png"])
    with pytest.raises(DataError, match="holds 1 image; at least two are needed"):
        open_data(tmp_path, task="image")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="no images"):
        open_data(tmp_path, task="image")


def test_an_unknown_task_names_near_ones():
    with pytest.raises(UsageError, match="'imag'; did you mean image"):
        open_data("digits", task="imag")
