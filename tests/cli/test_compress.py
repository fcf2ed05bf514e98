"""Tests of `compress`: one loadable file, a correct table, and user errors."""

import contextlib
import json
import time
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


def test_a_slower_result_is_said_before_anything_is_written(run, model, monkeypatch):
    """The warning names the ratio, and from which size the method pays."""
    seen: list[tuple[str, bool]] = []
    slow = {"before_ms": 1.0, "after_ms": 4.0, "speedup": 0.25, "least": 0.2, "most": 0.3}
    monkeypatch.setattr("vitarium.verbs.compress.timed", lambda *_: {"eager": slow})
    monkeypatch.setattr("vitarium.efficiency.growth.RUNGS", ((32, 32), (64, 32)))
    monkeypatch.setattr("vitarium.efficiency.growth.CLEAR", 1e9)
    monkeypatch.setattr("vitarium.efficiency.growth.SECONDS", 0.0)
    found = vitarium.compress(
        "m.safetensors", ["int8"], "small.safetensors", notify=lambda text: seen.append((text, Path("small.safetensors").exists()))
    )
    warned = [(text, written) for text, written in seen if text.startswith("Warning")]
    assert warned == [("Warning: the result is 4.00x slower [3.33, 5.00]: 1 ms before, 4 ms after.\n", False)]
    assert found.warnings[1].startswith(
        "On this machine int8 made none of the timed models faster, up to a width of 64 at 5 tokens (plain ViTs"
    )
    assert found.facts()["warning"] == found.warnings[0]
    result = run("compress", "m.safetensors", "--apply", "int8", "-o", "again.safetensors")
    assert "Warning: the result is 4.00x slower" in result.err
    fast = {**slow, "speedup": 2.0, "least": 0.9, "most": 2.5}
    monkeypatch.setattr("vitarium.verbs.compress.timed", lambda *_: {"eager": fast})
    assert vitarium.compress("m.safetensors", ["int8"], "fast.safetensors").warnings == []


def test_the_size_from_which_a_method_pays_is_the_first_that_it_makes_faster(monkeypatch):
    from vitarium.catalog.methods import parse_method
    from vitarium.efficiency import growth

    ratios = iter([0.5, 0.9, 1.4, 3.0])

    def timed(calls, **_):
        ratio = next(ratios)
        return {"before": [ratio] * 3, "after": [1.0] * 3}

    monkeypatch.setattr(growth, "RUNGS", ((32, 32), (64, 32), (96, 32), (128, 32)))
    monkeypatch.setattr(growth, "paired", timed)
    rungs = growth.growth(parse_method("mptq_vit"))
    assert [(rung.width, rung.tokens) for rung in rungs] == [(32, 5), (64, 5), (96, 5)]
    said = growth.verdict(parse_method("mptq_vit"), rungs)
    assert said.startswith("On this machine mptq_vit pays from a width of about 96 at 5 tokens (")
    assert "32: 0.50x, 64: 0.90x, 96: 1.40x" in said
    assert growth.growth(parse_method("evit:blocks=[11]")) == []


def test_a_compilation_that_does_not_finish_is_given_up(run, model, monkeypatch):
    def endless(module):
        def call(*_args, **_named):
            with contextlib.suppress(Exception):  # as a compiler that goes on after an error
                time.sleep(60)

        return call

    monkeypatch.setattr("torch.compile", endless)
    result = run("compress", "m.safetensors", "--apply", "int8", "--compile", "--compile-limit", 1, "-o", "small.safetensors")
    assert result.code == 0, result.err
    assert "not finished within 1 s; --compile-limit SECONDS raises the limit" in result.out
    assert Path("small.safetensors").exists()
    result = run("bench", "timm/vit_pico", "--kind", "compiled", "--compile-limit", 1, "--batch", 1, "--rounds", 3)
    assert result.code == 2
    assert "torch.compile of timm/vit_pico: not finished within 1 s" in result.err
