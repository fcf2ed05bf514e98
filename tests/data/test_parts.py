"""Names of parts, the choice of parts for training and evaluation, files that are left out, and links."""

import os

import pytest

from tests.data.pictures import encoded, picture, put
from vitarium.data import open_data
from vitarium.data.image_set import distinct
from vitarium.data.parts import find_parts, part_in, part_of
from vitarium.data.scan import scan
from vitarium.errors import DataError, UsageError
from vitarium.verbs.opening import find_images


def fill(root, *names):
    for name in names:
        put(root / name)
    return root


def files(images, root):
    return sorted(os.path.relpath(images.describe(i), root) for i in range(len(images)))


PARTS = {
    "train": ["train", "Train", "training", "training_set", "seg_train", "train2017", "TRAIN-images", "trainset", "train_data", "trainval"],
    "val": ["val", "Val", "valid", "VALIDATION", "valid_set", "val2017", "dev", "validation-images", "valset"],
    "test": ["test", "testing", "test_set", "seg_test", "Test", "testset", "test_images"],
    None: ["cat", "seg_pred", "trainer", "latest", "contest", "set", "values", "train_test", "", "evaluate me", "train ticket"],
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in PARTS.items() for name in names])
def test_one_table_of_names_for_all_tasks(part, name):
    assert part_of(name) == part


def test_the_most_usual_name_stands_for_a_part():
    assert find_parts(["training", "train", "validation", "val", "cat", "test"]) == {"train": "train", "val": "val", "test": "test"}
    assert part_in("imagenet-train-0001") == "train"
    assert part_in("shards-000") is None


LAYOUTS = [
    ("train", "val"),
    ("Train", "Val"),
    ("train", "test"),
    ("training_set", "test_set"),
    ("seg_train", "seg_test"),
    ("train", "valid"),
]


@pytest.mark.parametrize(("train", "held"), LAYOUTS)
@pytest.mark.parametrize("task", ["class", "image", "pairs", "retrieval"])
def test_held_out_images_stay_out_of_training_in_every_task(tmp_path, train, held, task):
    kinds = {train: "abcd", held: "efgh"} if task == "retrieval" else {train: "ab", held: "ab"}
    fill(tmp_path, *(f"{part}/{kind}/{i}.png" for part, names in kinds.items() for kind in names for i in range(3)))
    data = open_data(tmp_path, task=task)
    images = getattr(data.train, "images", data.train)
    learned = {os.path.relpath(images.describe(i), tmp_path).split(os.sep)[0] for i in range(len(images))}
    assert learned == {train}
    assert {file.split(os.sep)[0] for file in files(data.val, tmp_path)} == {held}
    assert data.part == ("test" if "test" in held else "val")


def test_archives_that_hold_a_folder_of_their_own_name(tmp_path):
    fill(tmp_path, *(f"{part}/{part}/{kind}/1.png" for part in ("seg_train", "seg_test") for kind in "ab"), "seg_pred/1.png")
    data = open_data(tmp_path)
    assert data.classes == ["a", "b"]
    assert (len(data.train), len(data.val)) == (2, 2)
    assert any("seg_pred is no part of the data, its 1 images are left out" in note for note in data.notes)


def test_parts_below_images_are_parts_of_pretraining(tmp_path):
    fill(tmp_path, *(f"images/{part}/{i}.png" for part in ("train", "val") for i in range(3)), "labels/x.png")
    data = open_data(tmp_path, task="image")
    assert files(data.train, tmp_path) == [f"images/train/{i}.png" for i in range(3)]
    assert files(data.val, tmp_path) == [f"images/val/{i}.png" for i in range(3)]
    assert any("1 images outside of its parts" in note for note in data.notes)


def test_test_beside_classes_is_held_out(tmp_path):
    fill(tmp_path, *(f"{place}{kind}/{i}.png" for place in ("", "test/") for kind in "ab" for i in range(2)))
    data = open_data(tmp_path)
    assert (data.classes, data.part, len(data.train), len(data.val)) == (["a", "b"], "test", 4, 4)
    assert len(open_data(tmp_path, task="image").train) == 4


def test_classes_may_be_called_as_parts(tmp_path):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in ("bus", "train", "car") for i in range(2)))
    assert open_data(tmp_path).classes == ["bus", "car", "train"]


def test_folders_with_underscores_are_classes(tmp_path):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in ("__background__", "cat") for i in range(2)), "__MACOSX/x.png")
    assert open_data(tmp_path).classes == ["__background__", "cat"]


# ---- evaluation


def evaluated(data, root):
    return data.part, files(data.val, root), len(data.train)


def test_every_labelled_image_is_evaluated(tmp_path):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in "abc" for i in range(6)))
    data = open_data(tmp_path, split="auto")
    assert evaluated(data, tmp_path) == ("all", [f"{kind}/{i}.png" for kind in "abc" for i in range(6)], 0)
    assert data.val.targets == [0] * 6 + [1] * 6 + [2] * 6
    assert len(open_data(tmp_path, split="val").val) == 3
    assert len(open_data(tmp_path, split="val", val_fraction=1).val) == 18
    with pytest.raises(DataError, match=r"has no part test; it has no parts\. Choose with --split \(auto, all,"):
        open_data(tmp_path, split="test")
    with pytest.raises(UsageError, match="no part 'tst'; did you mean test"):
        open_data(tmp_path, split="tst")


def test_one_class_an_empty_class_and_single_images_are_evaluated(tmp_path):
    fill(tmp_path / "one", "a/1.png", "a/2.png")
    assert len(open_data(tmp_path / "one", split="auto").val) == 2
    fill(tmp_path / "some", "a/1.png", "b/1.png")
    (tmp_path / "some/c").mkdir()
    data = open_data(tmp_path / "some", split="auto")
    assert len(data.val) == 2
    assert any("1 of 3 class folders hold no images (c/ holds nothing)" in note for note in data.notes)
    with pytest.raises(DataError, match="one class, 'a'"):
        open_data(tmp_path / "one")


@pytest.mark.parametrize("task", ["class", "image", "pairs"])
def test_parts_are_chosen_by_name(tmp_path, task):
    fill(tmp_path, *(f"{part}/{kind}/{i}.png" for part, n in (("train", 4), ("val", 2), ("test", 3)) for kind in "ab" for i in range(n)))
    counts = {}
    for split in ("auto", "val", "test", "train", "all"):
        data = open_data(tmp_path, task=task, split=split)
        counts[split] = (data.part, len(data.val))
    assert counts == {"auto": ("val", 4), "val": ("val", 4), "test": ("test", 6), "train": ("train", 8), "all": ("all", 18)}
    assert any("the part test (6 images) is not used here" in note for note in open_data(tmp_path, task=task).notes)


@pytest.mark.parametrize("task", ["class", "image", "pairs"])
def test_a_test_part_alone_is_evaluated(tmp_path, task):
    fill(tmp_path, *(f"test/{kind}/{i}.png" for kind in "ab" for i in range(2)))
    for split in ("auto", "test", "val", "all"):
        assert len(open_data(tmp_path, task=task, split=split).val) == 4, split


def test_embedded_data_has_parts():
    data = open_data("digits")
    assert open_data("digits", split="auto").val.targets == data.val.targets
    assert open_data("digits", split="train").val.targets == data.train.targets
    assert len(open_data("digits", split="all").val) == 1797
    assert len(open_data("scenes:length=20", split="all", task="semantic", image_size=16).val) == 20


def tar_of(path, kinds):
    import io
    import tarfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, kind in enumerate(kinds):
            for name, content in ((f"{i}.png", encoded(picture(i))), (f"{i}.cls", kind.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def masks_of(root, part, count):
    import numpy as np
    from PIL import Image

    for i in range(count):
        put(root / "images" / part / f"{i}.jpg")
        put(root / "masks" / part / f"{i}.png", encoded(Image.fromarray(np.eye(10, 12, dtype=np.uint8))))
    (root / "classes.txt").write_text("a\nb\n")


@pytest.mark.parametrize("kind", ["shards", "table", "labels", "masks"])
def test_other_kinds_of_data_are_evaluated_by_part(tmp_path, kind):
    """A test part alone, three parts, and data without parts."""
    for name, parts in (("alone", {"test": 3}), ("three", {"train": 6, "val": 4, "test": 3}), ("whole", {"": 5})):
        root = tmp_path / name
        rows = []
        for part, count in parts.items():
            if kind == "shards":
                tar_of(root / f"{part or 'x'}-0.tar", ["cat", "dog"] * (count // 2) + ["cat"] * (count % 2))
            elif kind == "masks":
                masks_of(root, part, count)
            else:
                names = [f"{part}{i}.png" for i in range(count)]
                rows += [f"{put(root / file).name},{('cat', 'dog')[i % 2]},{part}" for i, file in enumerate(names)]
        if rows:
            header = "path,label,split" if name != "whole" else "path,label,other"
            (root / "list.csv").write_text("\n".join([header, *rows]))
    spec = lambda name: tmp_path / name / "list.csv" if kind in ("table", "labels") else tmp_path / name
    task = {"labels": "multilabel", "masks": "semantic"}.get(kind, "class")
    count = lambda name, split: len(open_data(spec(name), task=task, split=split).val)
    assert [count("alone", split) for split in ("auto", "test", "all")] == [3, 3, 3]
    assert [count("three", split) for split in ("auto", "val", "test", "train", "all")] == [4, 4, 3, 6, 13]
    assert count("whole", "auto") == 5
    with pytest.raises(DataError, match="has no part train"):
        open_data(spec("alone"), task=task, split="train")


# ---- files that are left out


def test_files_that_are_left_out_are_counted_and_named(tmp_path, caplog):
    fill(tmp_path, *(f"{kind}/{i}.png" for kind in "ab" for i in range(2)))
    for name in ("a/1.heic", "a/2.HEIC", "b/x.psd", "b/notes.txt", "a/without"):
        put(tmp_path / name, b"\0\0\0\x18ftypheic")
    data = open_data(tmp_path)
    (note,) = data.notes
    assert "5 files are left out" in note
    assert "2 .heic (such as a/" in note
    assert "convert them to JPEG or PNG" in note
    assert "1 .psd (such as b/x.psd" in note
    assert "1 without an ending (such as a/without)" in note
    assert note in caplog.text


def test_images_of_all_known_names_are_read(tmp_path):
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture())
    for name, content in (
        ("1.jpe", jpeg),
        ("2.JFIF", jpeg),
        ("3", png),
        ("4", jpeg),
        ("5.dib", encoded(picture(), "BMP")),
        ("6.apng", png),
    ):
        put(tmp_path / "a" / name, content)
        put(tmp_path / "b" / name, content)
    put(tmp_path / "a/sound", b"RIFF\0\0\0\0WAVEfmt ")
    data = open_data(tmp_path)
    assert len(data.train) + len(data.val) == 12
    assert all(images[i][0].size == (12, 10) for images in (data.train, data.val) for i in range(len(images)))
    assert any("1 without an ending (such as a/sound)" in note for note in data.notes)


def test_images_outside_of_class_folders_are_counted(tmp_path):
    fill(tmp_path, *(f"train/{kind}/{i}.png" for kind in "ab" for i in range(2)), "train/loose.png")
    assert any("1 images lie outside of the class folders" in note for note in open_data(tmp_path).notes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_broken_links_do_not_stop_the_listing(tmp_path, tmp_path_factory):
    root = fill(tmp_path, *(f"{kind}/{i}.png" for kind in "ab" for i in range(2)))
    os.mkfifo(root / "a/pipe.png")
    os.mkfifo(root / "a/pipe")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("link.png", "link"):  # a link to a pipe is none to a file
        os.mkfifo(elsewhere / name)
        os.symlink(elsewhere / name, root / "b" / name)
    os.symlink("nowhere.png", root / "b/gone.png")
    data = open_data(root, split="all")
    assert len(data.val) == 5  # the broken link is listed, and is a broken image when it is read
    assert any("4 no regular file (such as a/pipe" in note for note in data.notes)


# ---- links


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("task", ["class", "image", "pairs"])
def test_the_folder_of_the_data_may_be_a_link(tmp_path, task):
    names = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    fill(tmp_path / "real", *names)
    os.symlink(tmp_path / "real", tmp_path / "link")
    os.symlink(tmp_path / "real", tmp_path / "real/a/again")
    data = open_data(tmp_path / "link", task=task, val_fraction=0.5)
    assert (distinct(data.train), len(data.val)) == (2, 2)
    assert find_images(tmp_path / "link") == [str(tmp_path / "link" / name) for name in names]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_add_no_images(tmp_path):
    """Links to the data itself, to its classes, to folders above it, and to single files of it."""
    root = fill(tmp_path / "data", *(f"{kind}/{i}.png" for kind in "ab" for i in range(5)), "b/deep/6.png")
    for target, link in (
        (".", "a/loop"),
        ("../..", "b/above"),
        ("../b", "a/other"),
        ("../b/deep", "a/deep"),
        ("../b/1.png", "a/again.png"),
    ):
        os.symlink(target if target != "." else root, root / link)
    found = scan([root / "a", root / "b"], root)
    assert [len(found.images[root / kind]) for kind in "ab"] == [5, 6]
    assert len(found.links) == 5
    assert any("5 links to files or folders that are counted already" in note for note in open_data(root).notes)
    os.symlink("../a", tmp_path / "elsewhere")
    os.symlink(root, root / "c")
    with pytest.raises(DataError, match="1 of 3 class folders hold no images"):
        open_data(root)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_to_other_places_are_followed(tmp_path):
    store = fill(tmp_path / "store", "1.png", "2.png", "3.png")
    root = fill(tmp_path / "data", "b/1.png", "b/2.png")
    os.symlink(store, root / "a")
    other = fill(tmp_path / "other", "7.png")
    os.symlink(other / "7.png", root / "b/linked.png")
    os.symlink(other / "7.png", root / "b/twice.png")
    found = scan([root / "a", root / "b"], root)
    assert [len(found.images[root / kind]) for kind in "ab"] == [3, 3]
    assert found.links == [str(root / "b/twice.png")] or found.links == [str(root / "b/linked.png")]


def test_data_say_whether_the_held_out_part_was_drawn(tmp_path):
    fill(tmp_path / "apart", *(f"{part}/{kind}/{i}.png" for part in ("train", "test") for kind in "ab" for i in range(4)))
    fill(tmp_path / "one", *(f"{kind}/{i}.png" for kind in "ab" for i in range(4)))
    for task in ("class", "image", "pairs"):
        assert [open_data(tmp_path / name, task=task).drawn for name in ("apart", "one")] == [False, True]
    assert [open_data(name).drawn for name in ("digits", "photos", "fashion")] == [True, True, False]
