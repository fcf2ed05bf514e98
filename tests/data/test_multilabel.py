"""Multi-label data: NIH's layout, CSV files of both forms, rendered X-rays, and user errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitarium.catalog import Preprocessing
from vitarium.data import open_data
from vitarium.data.multilabel import CHEST_FINDINGS
from vitarium.data.scenes import THINGS, Scenes
from vitarium.data.scenes.thorax import FINDINGS
from vitarium.errors import DataError, UsageError


def picture(path: Path, value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def nih(folder: Path, lines: list[tuple[str, str, int]], *, pictures: bool = True) -> Path:
    """A folder as NIH's: lines of (image, findings, patient), images in two archives' folders."""
    text = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age"]
    for number, (name, findings, patient) in enumerate(lines):
        text.append(f"{name},{findings},0,{patient},58")
        if pictures:
            picture(folder / f"images_00{1 + number % 2}" / "images" / name, 10 * number)
    folder.mkdir(exist_ok=True)
    (folder / "Data_Entry_2017.csv").write_text("\n".join(text))
    return folder


LINES = [
    ("1_0.png", "Cardiomegaly|Effusion", 1),
    ("1_1.png", "No Finding", 1),
    ("2_0.png", "Hernia", 2),
    ("3_0.png", "Effusion", 3),
    ("3_1.png", "Mass|Nodule|Effusion", 3),
    ("4_0.png", "No Finding", 4),
]


def labels_of(images, index: int) -> list[str]:
    _, target = images[index]
    assert target.dtype == np.float32
    return [name for name, value in zip(CHEST_FINDINGS, target, strict=True) if value]


def test_nih_layout_with_its_lists(tmp_path: Path):
    folder = nih(tmp_path / "nih", LINES)
    (folder / "train_val_list.txt").write_text("1_0.png\n1_1.png\n3_0.png\n3_1.png\n")
    (folder / "test_list.txt").write_text("2_0.png\n4_0.png\n")
    data = open_data(folder, task="multilabel")
    assert (data.name, data.classes, len(data.train), len(data.val)) == ("nih", list(CHEST_FINDINGS), 4, 2)
    assert [labels_of(data.train, i) for i in range(4)] == [["Cardiomegaly", "Effusion"], [], ["Effusion"], ["Effusion", "Mass", "Nodule"]]
    assert labels_of(data.val, 0) == ["Hernia"]
    assert data.val[0][0].getpixel((0, 0)) == 20  # found in images_001/images


def write_lists(folder: Path, labels: int = 14) -> None:
    """Lists as the authors of thorax_mae publish them: a name and 14 labels in each line."""
    folder.mkdir(exist_ok=True)
    rows = {name: [int(CHEST_FINDINGS[i] in found.split("|")) for i in range(labels)] for name, found, _ in LINES}
    for part, names in (("train", ["1_0.png", "1_1.png", "3_1.png"]), ("val", ["4_0.png"]), ("test", ["2_0.png"])):
        text = "".join(f"{name} {' '.join(map(str, rows[name]))}\n" for name in names)
        (folder / f"{part}_official.txt").write_text(text)


def test_lists_of_labels(tmp_path: Path):
    """In the folder of the images, elsewhere, and beside NIH's own table, whose labels and patients are then used."""
    folder = nih(tmp_path / "nih", LINES)
    write_lists(tmp_path / "splits")
    write_lists(folder)
    with_table = open_data(folder, task="multilabel")
    assert any("train_official.txt" in note for note in with_table.notes)
    (folder / "Data_Entry_2017.csv").unlink()
    for data in (
        with_table,
        open_data(folder, task="multilabel"),
        open_data(f"lists:{tmp_path / 'splits'},images={folder}", task="multilabel"),
    ):
        assert (data.name, data.classes, len(data.train), len(data.val), data.part) == ("nih", list(CHEST_FINDINGS), 3, 1, "val")
        assert [labels_of(data.train, i) for i in range(3)] == [["Cardiomegaly", "Effusion"], [], ["Effusion", "Mass", "Nodule"]]
        assert data.train[2][0].getpixel((0, 0)) == 40
    assert labels_of(open_data(folder, task="multilabel", split="test").val, 0) == ["Hernia"]
    write_lists(folder, labels=3)
    assert open_data(folder, task="multilabel").classes == ["label 0", "label 1", "label 2"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1_1.png 0 1", r"train_official.txt, line 2: '1_1.png 0 1' should be a name and 14 labels"),
        ("1_1.png 0 2" + " 0" * 12, "line 2: .*each 0 or 1"),
        ("9_9.png" + " 0" * 14, "1 of 3 images do not exist: 9_9.png"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, line: str, words: str):
    folder = nih(tmp_path / "nih", LINES)
    write_lists(folder)
    (folder / "Data_Entry_2017.csv").unlink()
    (folder / "test_official.txt").unlink()
    lines = (folder / "train_official.txt").read_text().splitlines()
    (folder / "train_official.txt").write_text(f"{lines[0]}\n{line}\n")
    with pytest.raises(DataError, match=words):
        open_data(folder, task="multilabel")
    with pytest.raises(DataError, match="no list of labels for training"):
        open_data(f"lists:{tmp_path}", task="multilabel")


@pytest.mark.parametrize("seed", range(4))
def test_no_patient_is_in_both_parts(tmp_path: Path, seed: int):
    data = open_data(nih(tmp_path / "nih", LINES), task="multilabel", seed=seed, val_fraction=0.5)
    parts = [{Path(part.describe(i)).name[0] for i in range(len(part))} for part in (data.train, data.val)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set("1234")


def test_a_patient_in_both_lists_is_refused(tmp_path: Path):
    folder = nih(tmp_path / "nih", LINES)
    (folder / "train_val_list.txt").write_text("1_0.png 2_0.png 3_0.png")
    (folder / "test_list.txt").write_text("1_1.png 4_0.png")
    with pytest.raises(DataError, match=r"1 patients are in both parts.*: 1; split by patient"):
        open_data(folder, task="multilabel")


def test_missing_pictures_are_named(tmp_path: Path):
    folder = nih(tmp_path / "nih", LINES, pictures=False)
    picture(folder / "images" / "1_0.png")
    with pytest.raises(DataError, match=r"5 of 6 images do not exist: 1_1.png, .*download them, or remove their rows"):
        open_data(folder, task="multilabel")


def table(folder: Path, text: str, pictures: str = "abcd") -> Path:
    for name in pictures:
        picture(folder / f"{name}.png")
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


def test_columns_of_yes_no_and_unknown(tmp_path: Path):
    """As CheXpert writes them: empty is no, -1 is uncertain; columns of other values are no labels."""
    path = table(tmp_path, "Path,Age,Edema,Mass,split\na.png,30,1.0,,train\nb.png,41,-1.0,1.0,train\nc.png,9,0.0,1.0,val\nd.png,8,,,val")
    data = open_data(path, task="multilabel")
    assert data.classes == ["Edema", "Mass"]
    np.testing.assert_array_equal([data.train[0][1], data.train[1][1]], [[1, 0], [np.nan, 1]])
    assert len(data.val) == 2


def test_a_column_of_lists(tmp_path: Path):
    path = table(tmp_path, "path,labels\na.png,cat|dog\nb.png,dog\nc.png,\nd.png,cat")
    data = open_data(tmp_path, task="multilabel", val_fraction=0.25)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (3, 1)
    assert open_data(f"csv:{path}", task="multilabel").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,cat\na.png,yes\nb.png,no", r"none of the columns cat \(it holds no, yes\) holds only 0 and 1"),
        ("name,cat\na.png,1", "and none with the path of an image"),
        ("", "no lines and none"),
        ("path,cat\na.png,0\nb.png,0", "no labels|no image of the training part has a label"),
        ("path,cat\na.png,1\na.png,0", "1 of 2 images are listed twice: a.png; keep one row"),
        ("path,cat,split\na.png,1,train\nb.png,0,train", "the column split has train; it needs train and val"),
        ("path,cat\na.png,1", "1 images cannot be divided"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, words: str):
    with pytest.raises(DataError, match=words):
        open_data(table(tmp_path, text), task="multilabel")


@pytest.mark.parametrize(
    ("spec", "words"),
    [("digits", "does not hold several labels"), ("scenes:task=action", "have one label each"), ("nowhere.csv", "accepted for")],
)
def test_data_of_another_kind(spec: str, words: str):
    with pytest.raises(DataError, match=words):
        open_data(spec, task="multilabel")


def test_scenes_label_every_visible_kind():
    data = open_data("scenes:length=40", task="multilabel", image_size=32)
    assert data.classes == list(THINGS)
    np.testing.assert_array_equal(data.train[3][1], Scenes(32, 0)[3].multi_label)


def test_drawn_xrays_have_independent_findings():
    data = open_data("scenes:task=thorax,length=2000", task="multilabel", image_size=16)
    targets = np.array(data.train.targets)
    assert data.classes == list(FINDINGS)
    np.testing.assert_allclose(targets.mean(0), [0.3, 0.3, 0.3, 0.5], atol=0.04)
    assert np.abs(np.corrcoef(targets.T) - np.eye(4)).max() < 0.08
    image, _ = data.val[0]
    pixels = np.asarray(image)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    again, _ = open_data("scenes:task=thorax,length=2000", task="multilabel", image_size=16).val[0]
    assert (np.asarray(again) == pixels).all()


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path):
    """A deep X-ray comes out as the same one of 8 bits, not as white or black."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "t.csv").write_text("path,edema,split\na.png,1,train\nb.png,0,val")
    data = open_data(tmp_path, task="multilabel")
    assert data.train[0][0].mode.startswith("I;16")
    see = Preprocessing(8, crop_pct=1.0)
    deep, flat = see(data.train[0][0]), see(data.val[0][0])
    assert (deep - flat).abs().max() < 0.02
    assert deep.std() > 0.5


# ---- separators, groups, parts and columns that are no labels


@pytest.mark.parametrize(
    ("cells", "separator"),
    [
        (["Shirt;Sneaker", "Shirt", "Bag;Shirt", ""], "';'"),
        (['"Shirt, Sneaker"', "Shirt", '"Bag, Shirt"', ""], "','"),
        (["Shirt|Sneaker", "Shirt", "Bag|Shirt", "none"], r"'\|'"),
        (["\"['Shirt', 'Sneaker']\"", "['Shirt']", "\"['Bag', 'Shirt']\"", "[]"], "','"),
    ],
)
def test_separators_are_recognised_and_said(tmp_path: Path, cells: list[str], separator: str):
    data = open_data(
        table(tmp_path, "path,labels\n" + "".join(f"{n}.png,{c}\n" for n, c in zip("abcd", cells, strict=True))), task="multilabel"
    )
    assert data.classes == ["Bag", "Shirt", "Sneaker"]
    both = [part[i] for part in (data.train, data.val) for i in range(len(part))]
    assert sorted(target.tolist() for _, target in both) == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 0]]
    assert re.search(f"the column labels holds 3 labels, separated by {separator}; separator=NAME", "\n".join(data.notes))


def test_spaces_separate_words_that_repeat_and_not_names(tmp_path: Path):
    rows = ["haze primary", "clear", "haze road", "clear road", "haze", "primary road haze", "clear primary", "primary", "road primary"]
    names = "abcdefghi"
    path = table(tmp_path, "image,tags\n" + "".join(f"{n}.png,{c}\n" for n, c in zip(names, rows, strict=True)), names)
    assert open_data(path, task="multilabel").classes == ["clear", "haze", "primary", "road"]
    path = table(tmp_path, "path,labels\na.png,Pleural Thickening\nb.png,Mass\nc.png,Lung Mass\nd.png,Mass")
    data = open_data(path, task="multilabel")
    assert data.classes == ["Lung Mass", "Mass", "Pleural Thickening"]
    assert "one label per image, as no separator was found" in data.notes[0]


def test_a_separator_can_be_set(tmp_path: Path):
    path = table(tmp_path, 'path,labels\na.png,"red, dark;wet"\nb.png,"red, dark"\nc.png,wet\nd.png,wet')
    assert open_data(path, task="multilabel").classes == ["red, dark", "wet"]
    assert open_data(f"csv:{path},separator=comma", task="multilabel").classes == ["dark", "dark;wet", "red", "wet"]
    with pytest.raises(UsageError, match="separator must be one of pipe, semicolon, comma"):
        open_data(f"csv:{path},separator=;", task="multilabel")
    with pytest.raises(UsageError, match="tables have no option 'seperator=comma'; did you mean separator"):
        open_data(f"csv:{path},seperator=comma", task="multilabel")
    with pytest.raises(UsageError, match="sets separator twice"):
        open_data(f"csv:{path},separator=comma,separator=none", task="multilabel")


@pytest.mark.parametrize("column", ["PatientID", "patient_id", "Patient ID", "subject_id", "Subject"])
def test_groups_are_kept_together_and_said(tmp_path: Path, column: str):
    text = f"path,labels,{column}\n" + "".join(f"{n}.png,{'cat' if i % 2 else 'dog'},{i // 3}\n" for i, n in enumerate("abcdefghi"))
    path = table(tmp_path, text, "abcdefghi")
    for seed in range(5):
        data = open_data(path, task="multilabel", seed=seed, val_fraction=0.3)
        groups = [{"abcdefghi".index(Path(part.describe(i)).stem) // 3 for i in range(len(part))} for part in (data.train, data.val)]
        assert not groups[0] & groups[1]
        classes = open_data(f"csv:{path},labels=labels", seed=seed, val_fraction=0.3)
        groups = [{"abcdefghi".index(Path(part.describe(i)).stem) // 3 for i in range(len(part))} for part in (classes.train, classes.val)]
        assert not groups[0] & groups[1]
    assert f"images of one {column} are kept in one part (3 groups)" in "\n".join(data.notes)
    assert "kept in one part" not in "\n".join(open_data(f"csv:{path},group=none", task="multilabel").notes)


def test_other_columns_are_labels_only_if_they_are_named(tmp_path: Path):
    text = "path,Sex,Age,cat,dog,is_valid\na.png,1,30,1,0,0\nb.png,0,31,0,1,0\nc.png,1,32,1,1,1\nd.png,1,33,0,1,1\n"
    path = table(tmp_path, text)
    data = open_data(path, task="multilabel")
    assert data.classes == ["cat", "dog"]
    said = "\n".join(data.notes)
    assert "the labels are the columns cat, dog" in said
    assert "columns that are not used: Sex, Age" in said
    assert open_data(f"csv:{path},labels=cat+Sex", task="multilabel").classes == ["cat", "Sex"]
    with pytest.raises(DataError, match="has no column 'Sx'; did you mean Sex"):
        open_data(f"csv:{path},labels=cat+Sx", task="multilabel")
    listed = table(tmp_path, "path,labels,Sex\na.png,cat;dog,1\nb.png,dog,0\nc.png,cat,1\nd.png,dog,1\n")
    data = open_data(listed, task="multilabel")
    assert data.classes == ["cat", "dog"]
    assert "columns that are not used: Sex" in "\n".join(data.notes)


@pytest.mark.parametrize(
    ("column", "cells", "words"),
    [
        ("is_valid", "0011", "the column is_valid gives the parts"),
        ("is_valid", ["False", "False", "True", "True"], "the column is_valid gives the parts"),
        ("subset", ["train", "train", "test", "test"], "the column subset gives the parts"),
        ("split", ["Training", "training", "valid", "valid"], "the column split gives the parts"),
        ("fold", ["train", "train", "val", "val"], "the column fold gives the parts"),
        ("subset", ["train", "train", "dev", "dev"], "the column subset gives the parts"),
    ],
)
@pytest.mark.parametrize("task", ["multilabel", "class"])
def test_columns_of_parts_are_honoured(tmp_path: Path, column: str, cells: list[str], words: str, task: str):
    text = f"path,label,{column}\n" + "".join(
        f"{n}.png,{'cd'[i % 2]},{cell}\n" for i, (n, cell) in enumerate(zip("abcd", cells, strict=True))
    )
    data = open_data(table(tmp_path, text), task=task)
    assert [Path(data.val.describe(i)).stem for i in range(len(data.val))] == ["c", "d"]
    assert words in "\n".join(data.notes)


@pytest.mark.parametrize("task", ["multilabel", "class"])
def test_folds_are_named_as_ignored_and_can_be_held_out(tmp_path: Path, task: str):
    text = "path,label,fold\n" + "".join(f"{n}.png,{'xy'[i % 2]},{i // 2}\n" for i, n in enumerate("abcdef"))
    path = table(tmp_path, text, "abcdef")
    data = open_data(path, task=task)
    assert re.search(r"the column fold \(0, 1, 2\) names no parts and is not used; fold=VALUE", "\n".join(data.notes))
    data = open_data(f"csv:{path},fold=1", task=task)
    assert [Path(data.val.describe(i)).stem for i in range(2)] == ["c", "d"]
    with pytest.raises(DataError, match="fold=7 leaves a part empty; the column fold has 0, 1, 2"):
        open_data(f"csv:{path},fold=7", task=task)


def test_tables_with_semicolons_and_tables_to_evaluate(tmp_path: Path):
    path = table(tmp_path, "path;cat;dog\na.png;1;0\nb.png;0;1\nc.png;1;1\nd.png;0;1\n")
    data = open_data(path, task="multilabel", split="auto")
    assert (data.classes, data.part, len(data.val), len(data.train)) == (["cat", "dog"], "all", 4, 0)
