"""Tests of image pairs for restoration."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vitarium.data import open_data
from vitarium.data.pairs import CROPS, scale_of
from vitarium.errors import DataError


def put(folder: Path, names: list[str], size: tuple[int, int] = (16, 12)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, (len(name), 0, 0)).save(folder / name)


def opened(spec: object, **options: object):
    return open_data(str(spec), task="pairs", **options)


def test_photographs_are_held_out_whole():
    data = opened("photos")
    train, val = ({part.describe(i) for i in range(len(part))} for part in (data.train, data.val))
    assert train
    assert val
    assert not train & val
    assert "galaxies" not in train | val
    picture, partner = data.val[0]
    assert partner is None
    assert picture.mode == "RGB"
    assert min(picture.size) >= 200


def test_a_folder_of_pictures_gives_many_crops_an_epoch(tmp_path):
    put(tmp_path / "a", ["1.png", "2.png"])
    put(tmp_path / "b", ["3.png"])
    data = opened(tmp_path)
    assert (len(data.train), len(data.val)) == (CROPS, 1)
    assert data.train[0][1] is None
    assert scale_of(data.train) is None
    assert {data.train.describe(i) for i in range(CROPS)}.isdisjoint({data.val.describe(0)})


def test_train_and_val_are_kept_apart(tmp_path):
    put(tmp_path / "train", ["1.png", "2.png"])
    put(tmp_path / "val", ["3.png"])
    assert opened(tmp_path).val.describe(0).endswith("3.png")


@pytest.mark.parametrize(("high", "low"), [("HR", "LR"), ("high", "low"), ("gt", "lq")])
def test_partners_are_found_by_name(tmp_path, high: str, low: str):
    put(tmp_path / high, ["1.png", "b x2.png", "3.png"], (32, 24))
    put(tmp_path / low, ["1x2.png", "b x2.png", "3.png"])
    data = opened(tmp_path, val_fraction=0.4)
    assert scale_of(data.train) == scale_of(data.val) == 2
    small, large = data.val[0]
    assert (small.size, large.size) == ((16, 12), (32, 24))
    assert len(data.val) == 1


def test_pairs_below_train_and_val(tmp_path):
    for part, names in (("train", ["1.png", "2.png"]), ("val", ["3.png"])):
        put(tmp_path / part / "HR", names, (49, 37))  # not a whole multiple: the rest is cut
        put(tmp_path / part / "LR", names)
    data = opened(tmp_path)
    assert scale_of(data.val) == 3
    assert data.val.describe(0).endswith("3.png")


def test_the_layout_of_div2k(tmp_path):
    for part, names in (("train", ["0001", "0002"]), ("valid", ["0801"])):
        put(tmp_path / f"DIV2K_{part}_HR", [f"{n}.png" for n in names], (64, 48))
        for scale in (2, 4):
            put(tmp_path / f"DIV2K_{part}_LR_bicubic" / f"X{scale}", [f"{n}x{scale}.png" for n in names], (64 // scale, 48 // scale))
    with pytest.raises(DataError, match=r"holds X2, X4; name one, as in .*:x2"):
        opened(tmp_path)
    data = opened(f"{tmp_path}:x4")
    assert scale_of(data.train) == 4
    assert data.val.describe(0).endswith("0801x4.png")
    with pytest.raises(DataError, match="holds no X3"):
        opened(f"{tmp_path}:x3")


def test_missing_partners_are_named(tmp_path):
    put(tmp_path / "HR", ["1.png", "2.png", "4.png"], (32, 24))
    put(tmp_path / "LR", ["1.png", "3.png", "4.png"])
    with pytest.raises(DataError, match=r"2 images have no partner.*HR/2, LR/3"):
        opened(tmp_path)


def test_sizes_that_do_not_fit_are_named(tmp_path):
    put(tmp_path / "HR", ["1.png", "2.png"], (32, 24))
    put(tmp_path / "HR", ["3.png"], (32, 20))
    put(tmp_path / "LR", ["1.png", "2.png", "3.png"])
    with pytest.raises(DataError, match=r"3\.png 16x12 to 32x20"):
        opened(tmp_path)
    put(tmp_path / "HR", ["3.png"], (64, 48))
    with pytest.raises(DataError, match="most pairs differ in size by 2, but 1 do not"):
        opened(tmp_path)


def test_a_broken_file_is_left_to_the_loader(tmp_path):
    put(tmp_path / "HR", ["1.png", "2.png", "3.png"], (32, 24))
    put(tmp_path / "LR", ["1.png", "2.png"])
    (tmp_path / "LR" / "3.png").write_bytes(b"no image")
    assert scale_of(opened(tmp_path).train) == 2
    for name in ("1.png", "2.png"):
        (tmp_path / "LR" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 3 pairs can be read"):
        opened(tmp_path)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(DataError, match="no folder 'nowhere'"):
        opened("nowhere")
    with pytest.raises(DataError, match="holds no images"):
        opened(tmp_path)
    put(tmp_path, ["1.png"])
    with pytest.raises(DataError, match="holds one image"):
        opened(tmp_path)
    put(tmp_path / "train" / "HR", ["1.png"], (32, 24))
    put(tmp_path / "train" / "LR", ["1.png"])
    put(tmp_path / "val", ["1.png"])
    with pytest.raises(DataError, match="but not below val"):
        opened(tmp_path)
    with pytest.raises(DataError, match="between 0 and 1"):
        opened("photos", val_fraction=1.0)
