"""`vitarium.info`: the same values as the command prints, as a result."""

import json

import pytest
import torch

import vitarium
from vitarium.errors import CheckpointError, UsageError


def test_a_model_by_name(tmp_path):
    found = vitarium.info("swin_tiny", image_size=224)
    assert found.report["name"] == "swin_tiny"
    assert found.facts()["parameters"].startswith("28.3 M")
    assert [table.title for table in found.tables()] == ["Stages", "Arguments"]
    assert "28.3 M" in repr(found)
    assert "window_size" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["params"] == found.report["params"]
    assert "unknown" not in found.to_dict()
    with pytest.raises(UsageError, match="did you mean swin_tiny"):
        vitarium.info("swin_tinny")


def test_a_foreign_model_has_no_family():
    found = vitarium.info("timm/resnet_pico", image_size=32)
    assert "variants" not in found.facts()
    assert [table.title for table in found.tables()] == ["Stages"]


def test_a_file_of_ours_and_of_others(tmp_path):
    model = vitarium.create_model("convnext_pico", num_classes=2, image_size=16)
    model.labels = ["cat", "<b>"]
    vitarium.save(model, tmp_path / "mine.safetensors")
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    mine, theirs = vitarium.info(tmp_path / "mine.safetensors"), vitarium.info(tmp_path / "theirs.pth")
    assert mine.is_file
    assert mine.facts()["labels"] == "cat, <b>"
    assert "&lt;b&gt;" in mine._repr_html_()
    assert mine.tables() == []
    assert "convnext_pico" in theirs.facts()["fits"]
    assert theirs.tables()[0].rows[0][1] == " x ".join(map(str, next(iter(model.state_dict().values())).shape))
    with pytest.raises(CheckpointError, match="there is no file"):
        vitarium.info(tmp_path / "gone.safetensors")
