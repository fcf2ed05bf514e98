import os
import unicodedata

import pytest

from tests.data.pictures import broken_kinds, odd_kinds, put
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.data import BadFiles, images, open_data
from vitarium.data.loader import Loader
from vitarium.errors import DataError


def fill(root, *names):
    for name in names:
        put(root / name)
    return root


def files(image_set):
    return [image_set.describe(i) for i in range(len(image_set))]


# ---- layouts


def test_one_level_is_split_by_class_with_a_fixed_seed(tmp_path):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)), "dog/deep/er/1.JPG", ".cache/x/1.png")
    data = open_data(tmp_path)
    again = open_data(str(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert data.name == tmp_path.name
    assert (len(data.train), len(data.val)) == (17, 4)
    assert sorted(data.val.targets) == [0, 0, 1, 1]
    assert not set(files(data.train)) & set(files(data.val))
    assert files(data.val) == files(again.val)
    assert files(data.val) != files(open_data(tmp_path, seed=1).val)
    image, target = data.train[0]
    assert image.size == (12, 10)
    assert target == data.train.targets[0] == 0


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Train", "valid"), ("training", "validation"), ("train", "test")])
def test_parts_of_their_own(tmp_path, train, val):
    fill(tmp_path, *(f"{part}/{kind}/{part}.png" for part in (train, val) for kind in "ab"))
    data = open_data(tmp_path)
    assert [os.path.relpath(f, tmp_path) for f in files(data.val)] == [os.path.join(val, k, f"{val}.png") for k in "ab"]
    assert data.train.targets == data.val.targets == [0, 1]


def test_test_is_left_alone_where_there_is_a_val(tmp_path):
    fill(tmp_path, *(f"{part}/{kind}/1.png" for part in ("train", "val", "test") for kind in "ab"))
    assert not any("test" in os.path.relpath(f, tmp_path) for f in files(open_data(tmp_path).val))


def test_train_alone_is_split(tmp_path):
    fill(tmp_path, *(f"train/{kind}/{i}.png" for kind in "ab" for i in range(5)))
    data = open_data(tmp_path)
    assert (len(data.train), len(data.val)) == (8, 2)


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    fill(tmp_path, *(f"{n}/{i}.png" for n in (10, 9, 100) for i in range(2)))
    assert open_data(tmp_path).classes == ["9", "10", "100"]


@pytest.mark.parametrize("name", ["with space", "Łódź", "写真", "emoji 🙂", "quote'\"", "per%cent#hash", "semi;colon,comma"])
def test_any_path_works(tmp_path, name):
    root = fill(tmp_path / name, *(f"{name}/{name} {i}.png" for i in range(2)), *(f"b/{i}.png" for i in range(2)))
    data = open_data(root)
    assert unicodedata.normalize("NFC", name) in data.classes
    assert data.train[0][0].size == (12, 10)


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    fill(tmp_path, *(f"train/{kind}/1.png" for kind in ("a", unicodedata.normalize("NFC", "é"))))
    fill(tmp_path, *(f"val/{kind}/1.png" for kind in ("a", unicodedata.normalize("NFD", "é"))))
    assert open_data(tmp_path).val.targets == [0, 1]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "store", "1.png", "2.png")
    fill(tmp_path / "data", "b/1.png", "b/2.png")
    os.symlink(tmp_path / "store", tmp_path / "data/a")
    os.symlink(tmp_path / "data/b", tmp_path / "data/b/loop")
    data = open_data(tmp_path / "data")
    assert len(data.train) + len(data.val) == 4


def test_a_folder_may_bear_the_name_of_embedded_data(tmp_path, monkeypatch):
    fill(tmp_path / "digits", *(f"{kind}/{i}.png" for kind in "ab" for i in range(2)))
    monkeypatch.chdir(tmp_path)
    assert open_data("folder:digits").classes == open_data("./digits").classes == ["a", "b"]


# ---- what cannot be trained on


FAULTS = {
    "empty": ([], "no images in class folders; it holds nothing; accepted: one folder per class"),
    "one class": (["a/1.png", "a/2.png"], "only one class, 'a'"),
    "empty class": (["a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/"], r"1 of 3 class folders hold no images \(c/ holds nothing\)"),
    "class of other files": (["a/1.png", "a/2.png", "b/x.txt"], r"b/ holds 1 \.txt files"),
    "class of one": (["a/1.png", "a/2.png", "b/1.png"], "a class with one image cannot be split; .*: b"),
    "no val images": (["train/a/1.png", "train/b/1.png", "val/a/1.png"], "1 of 2 classes have no held-out images: b"),
    "empty val": (["train/a/1.png", "train/b/1.png", "val/"], "val holds no images"),
    "val class unknown": (
        ["train/cat/1.png", "train/dog/1.png", "val/cats/1.png", "val/dog/1.png"],
        r"unknown classes: cats; did you mean cat\? \(known: cat, dog\)",
    ),
    "no train": (["val/a/1.png"], "holds val but no train; training needs a part train"),
    "loose images": (["1.png", "2.png"], "holds 2 images but no class folders"),
    "other files": (["a/1.mat", "a/2.mat", "b/1.csv"], r"it holds 2 \.mat and 1 \.csv files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_says_what_cannot_be_trained_on(tmp_path, fault):
    names, message = FAULTS[fault]
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        else:
            put(tmp_path / name, None if name.endswith("png") else b"x")
    with pytest.raises(DataError, match=message) as caught:
        open_data(tmp_path)
    assert caught.value.exit_code == 3


def test_names_what_is_near_a_path_that_does_not_exist(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match="did you mean flowers"):
        open_data(tmp_path / "flower")
    with pytest.raises(DataError, match=r"did you mean digits(.|\n)*accepted: fashion.*digits, photos, scenes"):
        open_data("digit")
    with pytest.raises(DataError, match="no data was given"):
        open_data("")


def test_a_single_file_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"a\.png is a single file"):
        open_data(put(tmp_path / "a.png"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_refuses_a_share_that_leaves_a_part_empty(tmp_path, fraction):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in "ab" for i in range(2)))
    with pytest.raises(DataError, match="between 0 and 1"):
        open_data(tmp_path, val_fraction=fraction)


# ---- broken images among good ones (faults 13 and 14)


def indices(loader):
    return [i for batch in loader.epoch(0) for i in batch["index"].tolist()]


def test_broken_pictures_are_listed_and_the_others_keep_their_order(tmp_path):
    """Twelve kinds in one folder: six odd ones are read, six broken ones are listed with their reasons."""
    fill(tmp_path, *(f"val/{kind}/1.png" for kind in "ab"), *(f"train/b/{i}.png" for i in range(6)))
    for name, content in odd_kinds().items():
        put(tmp_path / "train/a" / name, content)
    broken = broken_kinds()
    for name, (content, _) in broken.items():
        put(tmp_path / "train/a" / name, content)
    data = open_data(tmp_path).train
    bad = BadFiles(limit=0.4)
    loader = Loader(data, Preprocessing(8), batch_size=4, seed=3, shuffle=True, bad_files=bad)
    seen = indices(loader)
    assert dict(bad.items()).keys() == {str(tmp_path / "train/a" / name) for name in broken}
    assert all(broken[os.path.basename(path)][1] in reason for path, reason in bad.items())
    planned = [i for plan in loader.plan(0) for i in plan.indices]
    assert seen == [i for i in planned if os.path.basename(data.describe(i)) not in broken]
    bad.check(len(data))
    bad.limit = 0.01
    with pytest.raises(DataError, match="6 of 18 images cannot be read"):
        bad.check(len(data))


def test_a_file_that_vanishes_in_mid_epoch_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PAUSES", (0.0, 0.0, 0.0))
    fill(tmp_path, *(f"train/{kind}/{i}.png" for kind in "ab" for i in range(4)), "val/a/1.png", "val/b/1.png")
    data = open_data(tmp_path).train
    bad = BadFiles(limit=0.5)
    batches = Loader(data, Preprocessing(8), batch_size=2, bad_files=bad).epoch(0)
    next(batches)
    os.remove(data.samples[5])
    assert [i for batch in batches for i in batch["index"].tolist()] == [2, 3, 4, 6, 7]
    assert bad.items() == [(data.samples[5], "no such file or directory")]


# ---- tables


def write_table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_file_lists_pictures(tmp_path):
    fill(tmp_path, *(f"p/ü {i}.png" for i in range(6)))
    rows = "".join(f"p/ü {i}.png,{'dog' if i % 2 else 'cat'}\n" for i in range(6))
    data = open_data(write_table(tmp_path / "list.csv", f"\ufeffpath,label\n{rows}"))
    assert data.classes == ["cat", "dog"]
    assert data.name == "list"
    assert (len(data.train), len(data.val)) == (4, 2)
    split = "".join(f"p/ü {i}.png,{i % 2},{'train' if i < 4 else 'val'}\n" for i in range(6))
    data = open_data(write_table(tmp_path / "split.csv", f"file,class,split\n{split}"))
    assert [os.path.basename(f) for f in files(data.val)] == ["ü 4.png", "ü 5.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines; it needs a header line with path and label"),
        ("a,b\n1,2\n", "has columns a, b; it needs"),
        ("path,label\na.png,1\nnope.png,2\n", "1 files do not exist: .*nope.png"),
        ("path,label\na.png,1\na.png,2\n", "1 files are listed twice"),
        ("path,label\na.png,1\nb.png\n", "1 lines have no label: 3"),
        ("path,label,split\na.png,1,x\nb.png,2,y\n", "the column split has x, y; it needs train"),
    ],
)
def test_says_what_is_wrong_with_a_table(tmp_path, text, message):
    fill(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=message):
        open_data(write_table(tmp_path / "list.csv", text))
