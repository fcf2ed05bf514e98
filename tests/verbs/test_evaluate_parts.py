"""`evaluate` measures every labelled image that it is given, by the model's class names."""

import json
from pathlib import Path

import pytest

import vitarium
from tests.data.pictures import put
from vitarium.errors import DataError, UsageError

CHANGES = ["budget.steps=2", "batch_size=4", "eval_every=1.0", "ema=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of three classes, and its data of 30 images."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("ant", "bee", "cat"):
        for i in range(10):
            put(folder / "data" / kind / f"{kind}{i}.png")
    found = vitarium.train("pico", folder / "data", model="timm/vit_pico", changes=CHANGES, out=folder / "run")
    assert found is not None
    return found.file, folder / "data"


def test_other_data_is_measured_whole(trained: tuple[Path, Path], tmp_path: Path):
    file, _ = trained
    for kind, count in (("cat", 7), ("ant", 11)):
        for i in range(count):
            put(tmp_path / "photos" / kind / f"new{kind}{i}.png")
    found = vitarium.evaluate(file, tmp_path / "photos", output=tmp_path / "found.json")
    assert (found.images, found.split) == (18, "all")
    rows = {row["name"]: row["images"] for row in json.loads((tmp_path / "found.json").read_text())["classes"]}
    assert rows == {"ant": 11, "bee": 0, "cat": 7}
    model = vitarium.load(str(file))
    right = 0
    for kind in ("ant", "cat"):
        for answer in vitarium.predict(tmp_path / "photos" / kind, model).rows:
            right += answer["predictions"][0]["label"] == kind
    assert found.metrics["accuracy"] == pytest.approx(right / 18)
    assert vitarium.evaluate(file, tmp_path / "photos", val_fraction=1).images == 18
    assert vitarium.evaluate(file, tmp_path / "photos", val_fraction=0.5).images == 10  # 4 of 7 and 6 of 11: halves, rounded


def test_one_class_and_parts(trained: tuple[Path, Path], tmp_path: Path):
    file, _ = trained
    for part, count in (("test", 3), ("val", 2)):
        for i in range(count):
            put(tmp_path / part / "bee" / f"{part}{i}.png")
    assert vitarium.evaluate(file, tmp_path / "test").images == 3
    assert vitarium.evaluate(file, tmp_path, split="test").images == 3
    assert (vitarium.evaluate(file, tmp_path).images, vitarium.evaluate(file, tmp_path, split="all").images) == (2, 5)
    put(tmp_path / "test" / "dog" / "1.png")
    with pytest.raises(DataError, match="does not know 1 of the data's 2 classes, such as 'dog'"):
        vitarium.evaluate(file, tmp_path / "test")


def test_the_data_of_the_training_is_measured_on_what_was_held_out(trained: tuple[Path, Path]):
    file, data = trained
    found = vitarium.evaluate(file, data)
    assert (found.images, found.split) == (6, "val")
    assert vitarium.evaluate(file, data, split="all").images == 30
    assert vitarium.evaluate(file, data, split="train").images == 24


def test_methods_are_calibrated_on_images_that_are_not_measured(trained: tuple[Path, Path], tmp_path: Path):
    file, _ = trained
    for kind in ("ant", "bee"):
        for i in range(5):
            put(tmp_path / "photos" / kind / f"more{kind}{i}.png")
            put(tmp_path / "apart" / "test" / kind / f"test{kind}{i}.png")
    assert vitarium.evaluate(file, tmp_path / "photos", apply=["mptq_vit"]).images == 2
    with pytest.raises(UsageError, match="mptq_vit is calibrated on images, and apart has none for training"):
        vitarium.evaluate(file, tmp_path / "apart", apply=["mptq_vit"])


def test_a_table_of_labels_of_any_subject(tmp_path: Path):
    """By the recipe of the general name: training, and evaluation of another table with the labels in another order."""
    for name, count in (("photos", 12), ("more", 6)):
        lines = ["image,tags,PatientID"]
        for i in range(count):
            put(tmp_path / name / f"{i}.png")
            lines.append(f"{name}/{i}.png,{'shirt;bag' if i % 3 == 0 else 'shoe' if i % 3 == 1 else 'bag'},{i // 2}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    changes = [*CHANGES, "image_size=16"]
    found = vitarium.train("multilabel_pico", tmp_path / "photos.csv", model="timm/vit_pico", changes=changes, out=tmp_path / "run")
    assert found is not None
    assert found.model.labels == ["bag", "shirt", "shoe"]
    measured = vitarium.evaluate(found.file, tmp_path / "more.csv")
    assert (measured.images, measured.split) == (6, "all")
    assert [(row["name"], row["yes"]) for row in measured.metrics["findings"]] == [("bag", 4), ("shirt", 2), ("shoe", 2)]
    for result in (found, measured):
        assert any("separated by ';'" in note for note in result.to_dict()["notes"])
