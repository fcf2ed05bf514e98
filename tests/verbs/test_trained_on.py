"""A model's file remembers its data: `evaluate` measures what was held out, and says how many of the images were trained on."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vitarium
from tests.data.pictures import put
from vitarium.catalog.record import training_of
from vitarium.cli.app import app
from vitarium.errors import DataError

CHANGES = ["budget.steps=2", "batch_size=4", "eval_every=1.0", "ema=null", "seed=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of three classes, and its data of 30 images, 9 of which were held out."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("ant", "bee", "cat"):
        for i in range(10):
            put(folder / "data" / kind / f"{kind}{i}.png")
    changes = dict(changes=CHANGES, val_fraction=0.3, out=folder / "run")
    found = vitarium.train("pico", folder / "data", model="timm/vit_pico", **changes)
    assert found is not None
    return found.file, folder / "data"


def test_the_record_is_compact_and_comes_back(trained: tuple[Path, Path]):
    record = training_of(vitarium.load(trained[0])).data
    assert record is not None
    assert record.images is not None
    assert (record.source, record.seed, record.val_fraction) == (str(trained[1]), 3, 0.3)
    assert (record.images.count, len(record.images.digests)) == (21, 21 * 8)


def test_own_data_is_measured_on_what_was_held_out_wherever_it_is(trained: tuple[Path, Path], tmp_path: Path):
    file, data = trained
    shutil.copytree(data, tmp_path / "copy")
    for place in (data, tmp_path / "copy"):
        found = vitarium.evaluate(file, place)
        assert (found.images, found.split) == (9, "val")
        assert found.trained is not None
        assert found.facts()["trained on"] == "0 of 9 images"
    assert vitarium.evaluate(file, data, split="val").facts()["trained on"] == "0 of 9 images", "the seed of the training"


def test_images_of_the_training_are_counted(trained: tuple[Path, Path], tmp_path: Path):
    file, data = trained
    other_seed = vitarium.evaluate(file, data, seed=4)
    assert other_seed.trained is not None
    assert 0 < other_seed.trained.trained <= 9
    assert other_seed.to_dict()["trained_on"] == {"images": other_seed.trained.trained, "compared": 9}
    whole = vitarium.evaluate(file, data, split="all")
    assert whole.facts()["trained on"] == "21 of 30 images"
    for i in range(4):
        put(tmp_path / "new" / "ant" / f"new{i}.png")
    assert vitarium.evaluate(file, tmp_path / "new").facts()["trained on"] == "0 of 4 images"


def test_the_command_says_it(trained: tuple[Path, Path], monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    file, data = map(str, trained)
    result = CliRunner().invoke(app, ["evaluate", file, "--data", data, "--split", "all"])
    assert result.exit_code == 0
    assert "the model was trained on 21 of 30 of these images" in result.stderr
    assert "these images" not in CliRunner().invoke(app, ["evaluate", file, "--data", data]).stderr


def test_without_data_it_takes_that_of_the_training_and_says_so(trained: tuple[Path, Path], tmp_path: Path, monkeypatch):
    file, data = trained
    said: list[str] = []
    found = vitarium.evaluate(file, notify=said.append)
    assert (found.data, found.images, found.split) == (data.name, 9, "val")
    assert any(f"{data} is opened, on which the model was trained" in text for text in said)
    model = vitarium.load(file)
    record = training_of(model)
    assert record.data is not None
    record.data.source = "gone"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no data was named, and gone, on which the model was trained, is of no use here"):
        vitarium.evaluate(model)
    unknown = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16)
    said.clear()
    assert vitarium.evaluate(unknown, notify=said.append).data == "digits"
    assert any("does not record its own: the task's default, digits, is opened" in text for text in said)


def test_a_comparison_records_its_data(trained: tuple[Path, Path], tmp_path: Path):
    _, data = trained
    vitarium.compare(str(data), ["timm/vit_pico"], steps=2, batch_size=4, seed=5, val_fraction=0.4, out=tmp_path / "compared")
    file = next((tmp_path / "compared").rglob("model.safetensors"))
    record = training_of(vitarium.load(file)).data
    assert record is not None
    assert (record.source, record.seed, record.val_fraction) == (str(data), 5, 0.4)
    assert vitarium.evaluate(file, data).facts()["trained on"] == "0 of 12 images"


def test_broken_images_are_counted_by_data_set_as_in_training(trained: tuple[Path, Path], tmp_path: Path):
    for i in range(190):
        put(tmp_path / "data" / "train" / ("ant", "bee", "cat")[i % 3] / f"{i}.png")
    for i in range(20):
        put(tmp_path / "data" / "val" / ("ant", "bee", "cat")[i % 3] / f"{i}.png")
    for i in range(2):  # 10 % of the part, 1 % of the set
        (tmp_path / "data" / "val" / "ant" / f"{3 * i}.png").write_bytes(b"no image")
    found = vitarium.evaluate(trained[0], tmp_path / "data")
    assert (found.images, len(found.broken), found.split) == (18, 2, "val")
    assert len(vitarium.evaluate(trained[0], tmp_path / "data", split="all").broken) == 2
    (tmp_path / "data" / "val" / "ant" / "6.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3 of 210 images cannot be read \(1\.4 %"):
        vitarium.evaluate(trained[0], tmp_path / "data")
    with pytest.raises(DataError, match="3 of 210 images"):
        vitarium.evaluate(trained[0], tmp_path / "data", split="all")


def test_a_small_set_may_hold_one_broken_image(trained: tuple[Path, Path], tmp_path: Path):
    for i in range(4):
        put(tmp_path / "ant" / f"{i}.png")
    (tmp_path / "ant" / "2.png").write_bytes(b"no image")
    assert (len((found := vitarium.evaluate(trained[0], tmp_path)).broken), found.images) == (1, 3)
