"""Tests of `compress`: one loadable file, a correct table, and user errors."""

import json
from pathlib import Path

import pytest
import torch

import vitarium


@pytest.fixture
def model(run, monkeypatch):
    """A small ViT of ten classes in m.safetensors (`run` has moved to an empty folder)."""
    monkeypatch.setattr("vitarium.verbs.compress.ROUNDS", 1)
    monkeypatch.setattr("vitarium.verbs.compress.SECONDS", 0.0)
    monkeypatch.setattr("vitarium.verbs.opening.CALIBRATION_IMAGES", 16)
    torch.manual_seed(0)
    made = vitarium.create_model(
        "timm/vit_tiny_patch16_224", num_classes=10, image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    made.labels = [str(i) for i in range(10)]
    vitarium.save(made, "m.safetensors")
    return made


def test_methods_are_calibrated_applied_saved_and_told(run, model):
    result = run(
        *("compress", "m.safetensors", "--apply", "tome:r=2", "--apply", "mptq_vit:bits=4,search=mse,images=8"),
        *("--data", "digits", "-o", "small.safetensors", "--report", "r.json"),
    )
    assert result.code == 0, result.err
    for words in ("accuracy", "size on disk", "weights in memory", "MACs", "latency", "x less"):
        assert words in result.out
    report = json.loads(Path("r.json").read_text())
    assert report["after"]["disk_bytes"] < report["before"]["disk_bytes"]
    assert report["after"]["macs"] < report["before"]["macs"]
    assert report["quantized"] == {"layers": 10, "simulated": 1, "unpacked": 10}  # simulated: the patch embedding
    assert "Of 10 quantized layers 1 are simulated" in result.err
    loaded = vitarium.load("small.safetensors")
    assert [str(r.method) for r in loaded.methods] == ["tome:r=2", "mptq_vit:bits=4,search=mse,images=8"]


def test_without_data_only_what_needs_none(run, model):
    result = run("compress", "m.safetensors", "--apply", "int8", "-o", "small.safetensors", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert "accuracy" not in found["before"]
    assert found["quantized"] == {"layers": 9, "simulated": 0, "unpacked": 0}
    result = run("compress", "m.safetensors", "--apply", "mptq_vit", "-o", "other.safetensors")
    assert (result.code, "--data" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--apply", "mptq_vi", "-o", "s.safetensors"], "unknown method 'mptq_vi'; did you mean mptq_vit"),
        (["--apply", "mptq_vit:bit=4", "-o", "s.safetensors"], "mptq_vit has no option 'bit'; did you mean bits"),
        (["--apply", "mptq_vit:bits=40", "-o", "s.safetensors"], "bits must be a whole number from 3 to 8"),
        (["--apply", "int8", "-o", "s.pt"], "--output must end in .safetensors"),
        (["--apply", "int8", "--apply", "tome:r=2", "-o", "s.safetensors"], "give them in that order"),
    ],
)
def test_mistakes_are_told_and_write_nothing(run, model, tmp_path, arguments, message):
    result = run("compress", "m.safetensors", *arguments)
    assert result.code == 2
    assert message in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
