"""Tests of `fashion`: the embedded part, the published files, and what is refused."""

import gzip

import numpy as np
import pytest

from vitarium.data import fashion, open_data
from vitarium.errors import DataError, UsageError


def test_the_embedded_part_is_balanced_and_small():
    data = open_data("fashion")
    assert (len(data.train), len(data.val), data.image_size, data.part) == (8000, 2000, 28, "test")
    assert (np.bincount(data.train.targets) == 800).all()
    assert (np.bincount(data.val.targets) == 200).all()
    image, target = data.train[0]
    assert (image.size, image.mode, data.classes[target]) == ((28, 28), "RGB", "Ankle boot")
    assert data.val.describe(3) == "fashion test #3"
    image.putpixel((0, 0), (255, 0, 0))
    assert data.train[0][0].tobytes() != image.tobytes()


def test_the_file_carries_its_licence_and_the_numbers_of_its_images():
    file = fashion.resources.files("vitarium") / "data" / "assets" / "fashion.npz"
    assert file.stat().st_size < 5e6
    with np.load(file, allow_pickle=False) as arrays:
        assert "MIT License" in str(arrays["license"])
        assert "Zalando" in str(arrays["license"])
        assert (np.diff(arrays["train_numbers"].astype(int)) > 0).all(), "in the original order, each once"


def test_parts_and_fewer_images():
    whole = open_data("fashion")
    few = open_data("fashion:train=100,test=50")
    assert (len(few.train), len(few.val)) == (100, 50)
    assert (np.bincount(few.train.targets) == 10).all()
    first = next(i for i, target in enumerate(whole.train.targets) if target == few.train.targets[0])
    assert few.train[0][0].tobytes() == whole.train[first][0].tobytes()
    assert len(open_data("fashion", split="all").val) == 10_000
    assert len(open_data("fashion", split="train").val) == 8000
    assert len(open_data("fashion:test=20", split="test").val) == 20
    assert len(open_data("fashion:").train) == 8000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fashion:trian=10", "did you mean train"),
        ("fashion:train=15", "multiple of 10 from 10 to 8000"),
        ("fashion:test=2010", "to 2000"),
        ("fashion:test=x", "got 'x'"),
        ("fashion:train", "KEY=VALUE"),
        ("fashion:all,test=10", "no other options"),
        ("fashion:all=yes", "takes no value"),
        ("fashion:train=200,train=300", "sets train twice"),
        ("fashion:train=200,train=200", "sets train twice"),
    ],
)
def test_wrong_options(spec, message):
    with pytest.raises(UsageError, match=message):
        open_data(spec)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder as torchvision writes it, with few images."""
    monkeypatch.setattr(fashion, "SYSTEM_COPY", str(tmp_path / "none"))
    monkeypatch.setenv("VITARIUM_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 20)):
        images_name, labels_name = fashion.FILES[part]
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / images_name).write_bytes(idx(images))
        (folder / f"{labels_name}.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def idx(values):
    """The bytes of an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def test_all_reads_the_published_files(published):
    data = open_data("fashion:all")
    assert (len(data.train), len(data.val), data.part) == (30, 20, "test")
    assert data.train.targets[:11] == [*range(10), 0]
    images, _ = fashion.read_published(published, "train")
    assert np.asarray(data.train[7][0])[..., 1].tolist() == images[7].tolist()


def test_another_folder_is_read_in_the_same_process(published, tmp_path, monkeypatch):
    first = open_data("fashion:all").train[0][0].tobytes()
    other = tmp_path / "other" / "FashionMNIST" / "raw"
    other.mkdir(parents=True)
    for file in published.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((30, 28, 28), np.uint8)))
    monkeypatch.setenv("VITARIUM_DATA", str(tmp_path / "other"))
    assert open_data("fashion:all").train[0][0].tobytes() == bytes(3 * 28 * 28) != first


def test_without_a_copy_all_names_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "SYSTEM_COPY", str(tmp_path / "none"))
    monkeypatch.delenv("VITARIUM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_data("fashion:all")
    for way in ("apt install dataset-fashion-mnist", "torchvision.datasets.FashionMNIST", "t10k-labels-idx1-ubyte.gz"):
        assert way in str(error.value)
    assert "  " not in str(error.value).replace("\n  ", "\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", idx(np.zeros((2, 28, 28), np.uint8))[:-1], "the file holds 1567"),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 3]) + b"\xff" * 12, "announces"),
        ("train-images-idx3-ubyte", idx(np.zeros((30, 27, 28), np.uint8)), "images of 28x28"),
        ("train-labels-idx1-ubyte.gz", b"no gzip", "cannot be read"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(np.full(30, 200, np.uint8))), "labels from 0 to 9"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(bytes(65 * 2**20)), "at most 64 MB"),
    ],
)
def test_files_that_are_something_else(published, name, content, message):
    (published / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data("fashion:all")
