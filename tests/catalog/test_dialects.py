"""Dialects of every family: files of timm, torchvision and transformers load, and the error for a wrong variant suggests the right one.

On the meta device: names and shapes of models of any size, without their memory. That the values come out right is for the goldens.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import vitarium
from tests.variants import some_of
from vitarium.catalog import families
from vitarium.catalog.checkpoints import LoadReport, _fit, _readings, load_checkpoint, models_that_fit
from vitarium.catalog.registry import find_model
from vitarium.catalog.states import Weights

FAMILIES = {family.name: family for family in families()}
GOLDENS = Path(__file__).parents[1] / "golden"


def on_meta(build, *args, **options) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **options)


def ours(name: str, **options) -> nn.Module:
    family, variant = find_model(name)
    return on_meta(family.cls, **family.arguments(variant), **options)


def best_report(name: str, state: dict[str, torch.Tensor]) -> LoadReport:
    """What load_checkpoint would say of a state, for a model of that name."""
    model, weights = ours(name), Weights(Path("w.pth"), [state])
    fits = [_fit(model, s, LoadReport("", d)) for d, s in _readings(find_model(name)[0].dialects, weights)]
    return max(fits, key=lambda fit: fit.quality()).report


def timm_sources() -> list[tuple[str, str, str]]:
    return [
        (f"{family.name}_{variant}", tag, source.removeprefix("timm:"))
        for family in FAMILIES.values()
        for variant, tags in family.weights.items()
        for tag, sources in tags.items()
        for source in sources
        if source.startswith("timm:")
    ]


@pytest.mark.parametrize(("name", "tag", "source"), timm_sources())
def test_every_timm_source_is_in_timms_table_and_fits(name, tag, source):
    timm = pytest.importorskip("timm")
    cfg = timm.models.get_pretrained_cfg(source)
    assert cfg is not None, f"timm knows no {source}"
    state = on_meta(timm.create_model, source).state_dict()
    report = best_report(name, state)
    assert report.complete, report
    assert not report.resized
    named = find_model(name)[0].dialects
    assert report.dialect in (
        {"timm", "ours"} if "timm" in named else {"ours", *named, "mae, patches"}
    )  # else timm keeps the authors' names


TORCHVISION = {
    "swin_tiny": "swin_t",
    "swin_small": "swin_s",
    "swin_base": "swin_b",
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "convnext_base": "convnext_base",
    "convnext_large": "convnext_large",
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_names_fit(name):
    import torchvision

    report = best_report(name, on_meta(getattr(torchvision.models, TORCHVISION[name])).state_dict())
    assert report.complete, report
    assert report.dialect == "torchvision"


def transformers_pico(name: str, transformers) -> nn.Module:
    """Our pico, as transformers would have built it."""
    family, variant = find_model(name)
    arguments = family.arguments(variant)
    common = dict(patch_size=arguments.get("patch_size", 4), num_labels=10, depths=arguments["depths"])
    if name == "swin_pico":
        heads, window = arguments["num_heads"], arguments["window_size"]
        config = transformers.SwinConfig(embed_dim=arguments["embed_dim"], num_heads=heads, window_size=window, image_size=16, **common)
        return transformers.SwinForImageClassification(config)
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=arguments["dims"], **common)
    return transformers.ConvNextForImageClassification(config)


@pytest.mark.parametrize("name", ["swin_pico", "convnext_pico"])
def test_a_file_that_transformers_wrote_loads_and_gives_its_outputs(tmp_path, name):
    theirs = transformers_pico(name, pytest.importorskip("transformers")).eval()
    theirs.save_pretrained(tmp_path)
    model = vitarium.create_model(name, num_classes=10).eval()
    assert load_checkpoint(model, tmp_path / "model.safetensors").dialect == "transformers"
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs(pixel_values=image).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("golden", "name"), [("swin-tiny_w7_224", "swin_tiny"), ("convnext-tiny_224", "convnext_tiny")])
def test_the_authors_names_fit(golden, name):
    rows = json.loads((GOLDENS / f"{golden}.json").read_text())["state"]
    state = {k: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for k, (kind, *shape) in rows.items()}
    report = best_report(name, state)
    assert report.complete, report
    assert report.dialect == "official"
    assert models_that_fit(Weights(Path("w.pth"), [state]), near=name) == [name]


@functools.lru_cache(maxsize=2)
def siblings(family: str) -> dict[str, nn.Module]:
    """All variants of a family, without memory; built once for the tests of each."""
    return {name: ours(name) for name in FAMILIES[family].model_names()}


@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in some_of(family.model_names())])
def test_the_right_variant_is_found_in_every_case(name):
    """A file of any variant, given to any other: it fits exactly or by resizing, or the refusal names the variant that it is of."""
    model = ours(name)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    others = siblings(find_model(name)[0].name)
    same = [other for other, m in others.items() if {k: v.shape for k, v in m.state_dict().items()} == shapes]
    for other in others:
        report = _fit(others[other], model.state_dict(), LoadReport("")).report
        assert not report.complete or other in same or report.resized, report
    assert models_that_fit(Weights(Path("w.pth"), [model.state_dict()]), near=next(iter(others))) == same


def test_a_file_of_another_family_is_recognised():
    state = ours("convnext_tiny").state_dict()
    assert models_that_fit(Weights(Path("w.pth"), [state]), near="swin_tiny") == ["convnext_tiny"]
