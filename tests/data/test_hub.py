import sys

import pytest

from tests.data.pictures import encoded, picture
from vitarium.data import BrokenImage, open_data
from vitarium.errors import DataError, MissingExtra


@pytest.fixture(scope="module")
def hub():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


def rows(hub, labels, names=("cat", "dog"), broken=(), **columns):
    """A data set of images with the given class numbers."""
    pictures = [{"bytes": b"" if n in broken else encoded(picture(n)), "path": None} for n in range(len(labels))]
    types = {"photo": hub.Image(), "kind": hub.ClassLabel(names=list(names)) if names else hub.Value("string")}
    types |= {name: hub.Value("int64") for name in columns}
    return hub.Dataset.from_dict({"photo": pictures, "kind": labels, **columns}, features=hub.Features(types))


def test_a_saved_data_set(hub, tmp_path):
    rows(hub, [0, 1] * 5).save_to_disk(tmp_path / "my ü set")
    data = open_data(tmp_path / "my ü set")
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (8, 2)
    image, target = data.val[0]
    row = int(data.val.describe(0).split("[")[1][:-1])
    assert data.val.describe(0) == f"my ü set/train[{row}]"
    assert image.tobytes() == picture(row).tobytes()
    assert target == row % 2


def test_parts_by_their_names(hub, tmp_path):
    parts = {"train": rows(hub, [1, 0, 1, 0]), "validation": rows(hub, [0, 1]), "test": rows(hub, [-1, -1])}
    hub.DatasetDict(parts).save_to_disk(tmp_path)
    data = open_data(f"hf:{tmp_path}")
    assert data.train.targets == [1, 0, 1, 0]
    assert data.val.targets == [0, 1]


def test_a_broken_picture_is_named(hub, tmp_path):
    rows(hub, [0, 1] * 5, broken=range(10)).save_to_disk(tmp_path / "d")
    with pytest.raises(BrokenImage, match=r"d/train\[\d+\]: the file is empty"):
        open_data(tmp_path / "d").train[0]


def test_labels_without_class_names(hub, tmp_path):
    rows(hub, ["b", "a"] * 3, names=None).rename_column("kind", "label").save_to_disk(tmp_path)
    assert open_data(tmp_path).classes == ["a", "b"]


def test_says_what_is_wrong(hub, tmp_path):
    rows(hub, [0, 1] * 3, names=None).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError, match=r"needs a column of type Image and one of type ClassLabel; it has photo \(Image\), kind \(Value\)"):
        open_data(tmp_path / "a")
    hub.DatasetDict({"test": rows(hub, [0, 1])}).save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match="no train split; it has test"):
        open_data(tmp_path / "b")
    rows(hub, [1, 0, 3], names=None).rename_column("kind", "label").cast_column("label", hub.Value("float32")).save_to_disk(tmp_path / "c")
    with pytest.raises(DataError, match=r"row 0 has the label 1\.0; accepted: class numbers or names, and -1 for none"):
        open_data(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot read the saved data set"):
        open_data(tmp_path / "d")


def test_rows_without_a_label_and_names_without_images_are_left_out(hub, tmp_path):
    parts = {
        "train": rows(hub, [0, 1, -1, 0, 1, 0, 1], names=("cat", "dog", "fox")),
        "test": rows(hub, [-1, -1], names=("cat", "dog", "fox")),
    }
    hub.DatasetDict(parts).save_to_disk(tmp_path)
    data = open_data(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.val), data.part) == (4, 2, "val")
    notes = "\n".join(data.notes)
    assert "(train): 1 of 7 rows have no label and are left out" in notes
    assert "(test): 2 of 2 rows have no label and are left out; the part is not used" in notes
    assert "1 of 3 class names have no images and are left out: fox" in notes
    with pytest.raises(DataError, match="has no part test"):
        open_data(tmp_path, split="test")


def test_a_test_part_alone_is_evaluated(hub, tmp_path):
    hub.DatasetDict({"test": rows(hub, [1, 1, 0])}).save_to_disk(tmp_path)
    data = open_data(tmp_path, split="auto")
    assert (data.val.targets, data.part, len(data.train)) == ([1, 1, 0], "test", 0)


def test_names_the_extra_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vitarium\[data\]'"):
        open_data(f"hf:{tmp_path}")
