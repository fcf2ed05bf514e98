"""Every method on every kind of model: `compress` writes a file that loads with equal outputs, `bench` times it, `generate --apply` makes
images, or the method is refused with the reason and the methods that fit."""

import functools
from pathlib import Path

import pytest
import torch

import vitarium
from vitarium.catalog.methods import list_methods, parse_method
from vitarium.efficiency import bench as benchmarks
from vitarium.errors import AttachError, UnsupportedModel, UsageError
from vitarium.training.tasks import task_of

METHODS = (
    "evit", "pitome", "tome:r=2", "sparse_prune", "sparse_prune:structure=channels", "sparse_prune:structure=both",
    "sparse_prune:score=activation", "int8", "int4w", "mptq_vit:images=2,search=minmax", "lora", "vpt_proxies",
)  # fmt: skip
PLAIN = {"evit", "pitome", "tome:r=2", "sparse_prune:structure=both", "lora", "vpt_proxies"}
"""Methods for plain vision transformers alone."""
MODELS = {
    "dit_pico": ("digits", {}, PLAIN),
    "sit_flow_pico": ("digits", {}, PLAIN),
    "repa_pico": ("digits", {}, PLAIN),
    "dit_routing_pico": ("digits", {"num_classes": 10}, PLAIN),
    "var_pico": ("digits", {}, PLAIN),
    "var_tokenizer_pico": ("digits", {}, PLAIN | {"sparse_prune:structure=channels", "sparse_prune:score=activation", "int8", "int4w"}),
    "dcgan_pico": ("digits", {}, PLAIN | {"sparse_prune:structure=channels"}),
    "drct_pico": ("photos", {"depths": [1], "embed_dim": 16}, PLAIN),
    "kmax_deeplab_pico": ("scenes:length=24", {}, PLAIN),
    "uniformer_video_pico": ("scenes:length=24,task=action", {"num_classes": 6}, PLAIN),
    "t_tame_pico": ("digits", {"num_classes": 10}, {"evit", "pitome", "tome:r=2", "vpt_proxies"}),
    "thorax_mae_pretrain_pico": ("digits", {}, set()),
    "vpt_proxies_pico": ("scenes:length=60", {}, set()),
}
"""Model -> data for its calibration, arguments, and the methods that it refuses."""


@pytest.fixture
def quick(monkeypatch, tmp_path) -> Path:
    """Commands without repetitions and metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitarium.verbs.compress.ROUNDS", 1)
    monkeypatch.setattr("vitarium.verbs.compress.SECONDS", 0.0)
    monkeypatch.setattr("vitarium.verbs.compress.primary_value", lambda model, *_: {task_of(model).primary.name: 0.0})
    monkeypatch.setattr("vitarium.verbs.compress.slower", lambda *_: [])
    monkeypatch.setattr("vitarium.verbs.opening.CALIBRATION_IMAGES", 4)
    monkeypatch.setattr(benchmarks, "paired", functools.partial(benchmarks.paired, least_seconds=0.0))
    return tmp_path


def test_the_matrix_holds_every_method():
    assert {parse_method(text).slug for text in METHODS} == set(list_methods())


@pytest.mark.parametrize("name", MODELS)
def test_a_method_works_or_is_refused_for_its_reason(name, quick):
    data, arguments, refused = MODELS[name]
    torch.manual_seed(0)
    vitarium.save(vitarium.create_model(name, **arguments), "m.safetensors")
    for method in METHODS:
        calibrated = "calibration" in vars(parse_method(method)) and parse_method(method).calibration is None  # type: ignore[attr-defined]
        given = data if calibrated else None
        if method in refused:
            with pytest.raises((AttachError, UnsupportedModel), match="methods that fit this"):
                vitarium.compress("m.safetensors", [method], "s.safetensors", given)
            continue
        found = vitarium.compress("m.safetensors", [method], "s.safetensors", given)  # compares the loaded file's outputs
        assert [str(report.method) for report in vitarium.load(found.file).methods] == [str(parse_method(method))]
        if method == "int8":
            (row,) = vitarium.bench(found.file, rounds=3, batch=1, kind="inference").rows
            assert row.ours_ms > 0


@pytest.mark.parametrize("name", ["dit_pico", "sit_flow_pico", "var_pico", "dcgan_pico"])
def test_images_are_generated_under_a_method_or_it_is_refused(name, quick):
    torch.manual_seed(0)
    vitarium.save(vitarium.create_model(name), "m.safetensors")
    steps = {} if name in ("var_pico", "dcgan_pico") else {"steps": 2}
    for method in ("sparse_prune", "int8", "int4w"):
        made = vitarium.generate("m.safetensors", "0", 1, apply=[method], device="cpu", **steps)
        assert made.images.isfinite().all()
    with pytest.raises(UnsupportedModel, match="methods that fit this"):
        vitarium.generate("m.safetensors", "0", 1, apply=["evit"], device="cpu", **steps)
    with pytest.raises(UsageError, match=r"calibrated on images: 'vitarium compress MODEL --apply mptq_vit --data DIR --output FILE'"):
        vitarium.generate("m.safetensors", "0", 1, apply=["mptq_vit"], device="cpu", **steps)
