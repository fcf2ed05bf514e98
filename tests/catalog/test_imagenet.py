"""Tests of the choice of ImageNet-1K's rows from a head of ImageNet-22K."""

from __future__ import annotations

import pytest
import torch

import vitarium
from vitarium.catalog.heads import fresh_names
from vitarium.catalog.imagenet import head_of_1k, rows_of_1k

TEDDY = 850  # teddy bear, n04399382


def test_rows_are_found_by_name():
    from timm.data import ImageNetInfo

    all_names, names = (ImageNetInfo(kind).label_names() for kind in ("imagenet-22k", "imagenet-1k"))
    rows = rows_of_1k()
    assert [None if row is None else all_names[row] for row in rows] == [name if i != TEDDY else None for i, name in enumerate(names)]
    assert rows[:5] == (359, 368, 460, 475, 486)  # as in the lists of the authors of Swin and TinyViT
    assert rows[-4:] == (21194, 21198, 21367, 21815)  # TinyViT's


def test_swins_list_is_that_of_its_authors():
    rows = rows_of_1k("imagenet-21k-goog")
    assert rows[-4:] == (21196, 21200, 21369, 21817)
    assert rows[TEDDY] == 5564
    assert sum(a != b for a, b in zip(rows, rows_of_1k(), strict=True)) > 100


def test_the_class_without_a_row_gets_the_mean_of_the_others():
    head = torch.randn(21841, 3, dtype=torch.float64)
    chosen = head_of_1k(head)
    others = [i for i in range(1000) if i != TEDDY]
    assert torch.equal(chosen[0], head[359])
    torch.testing.assert_close(chosen[TEDDY], chosen[others].mean(0))


@pytest.mark.parametrize(("name", "usable"), [("convnext_pico", True), ("swin_pico", False)])
def test_files_of_22k_start_models_of_1k(tmp_path, caplog, name: str, usable: bool):
    source = vitarium.create_model(name, num_classes=21841)
    torch.nn.init.normal_(source.head.bias)
    torch.save({"model": source.state_dict()}, tmp_path / "22k.pth")
    model = vitarium.create_model(name, num_classes=1000, checkpoint=tmp_path / "22k.pth")
    order = "imagenet-22k" if usable else "imagenet-21k-goog"
    assert torch.equal(model.head.bias, head_of_1k(source.head.bias, order))
    assert torch.equal(model.head.weight, head_of_1k(source.head.weight, order))
    assert "1,000 classes were taken as those of ImageNet-1K" in caplog.text
    assert fresh_names(model) == ([] if usable else ["head.bias", "head.weight"])
    assert vitarium.create_model(name, checkpoint=tmp_path / "22k.pth").num_classes == 21841
    assert vitarium.create_model(name, num_classes=999, checkpoint=tmp_path / "22k.pth").num_classes == 999
