"""Files with only the trained part: the base is found automatically, and a missing or different base raises a clear error."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import vitarium
from vitarium.errors import CheckpointError, UsageError


def vit(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return vitarium.create_model("timm/vit_pico", num_classes=5, image_size=16, **options)


@pytest.fixture
def base(tmp_path):
    vitarium.save(vit(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def adapted(base, text: str = "vpt_proxies:prompts=2,embed_dim=8") -> nn.Module:
    model = vitarium.load(base)
    vitarium.apply(model, text, quiet=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
    return model


def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("text", ["vpt_proxies:prompts=2,embed_dim=8", "lora:rank=2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_and_its_base_are_the_model(base, tmp_path, text, dtype):
    model = adapted(base, text).to(dtype)
    vitarium.save(model, tmp_path / "a.safetensors", trained_only=True)
    loaded = vitarium.load(tmp_path / "a.safetensors")
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert torch.equal(loaded(image().to(dtype)), model(image().to(dtype)))
    assert (tmp_path / "a.safetensors").stat().st_size < 0.4 * base.stat().st_size
    vitarium.save(loaded, tmp_path / "b.safetensors", trained_only=True)  # it goes on knowing its base
    assert torch.equal(vitarium.load(tmp_path / "b.safetensors")(image().to(dtype)), model(image().to(dtype)))
    vitarium.save(loaded, tmp_path / "whole.safetensors")
    base.unlink()
    assert torch.equal(vitarium.load(tmp_path / "whole.safetensors")(image().to(dtype)), model(image().to(dtype)))


def test_a_base_by_the_authors_names_and_in_a_torch_file(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "weights.pth")
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16, checkpoint=tmp_path / "weights.pth", strict=False)
    vitarium.apply(model, "vpt_proxies:prompts=2", quiet=True)
    vitarium.save(model, tmp_path / "a.safetensors", trained_only=True)
    assert torch.equal(vitarium.load(tmp_path / "a.safetensors")(image()), model.eval()(image()))


def test_a_base_that_moved_is_found_beside_or_by_name_and_a_missing_one_is_told(base, tmp_path):
    model = adapted(base)
    vitarium.save(model, tmp_path / "a.safetensors", trained_only=True)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "elsewhere")
    moved = base.rename(tmp_path / "elsewhere" / base.name)
    assert torch.equal(vitarium.load(tmp_path / "elsewhere" / "a.safetensors")(image()), model(image()))
    with pytest.raises(CheckpointError, match=r"base is missing: the weights from .*base\.safetensors.*base=FILE"):
        vitarium.load(tmp_path / "a.safetensors")
    assert torch.equal(vitarium.load(tmp_path / "a.safetensors", base=moved)(image()), model(image()))


def test_another_base_is_refused(base, tmp_path):
    vitarium.save(adapted(base), tmp_path / "a.safetensors", trained_only=True)
    vitarium.save(vit(seed=1), base)
    with pytest.raises(CheckpointError, match=r"on top of another timm/vit_pico than .* wanted"):
        vitarium.load(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="takes no base"):
        vitarium.load(base, base=base)


def test_what_no_file_could_bring_back_is_not_written(base, tmp_path):
    for model, told in (
        (vitarium.load(base), "every parameter"),
        (vitarium.apply(vit(), "lora:rank=2", quiet=True), "in no file that could be named"),
    ):
        with pytest.raises(UsageError, match=told):
            vitarium.save(model, tmp_path / "a.safetensors", trained_only=True)
    model = adapted(base)
    model.get_parameter("blocks.0.mlp.fc1.weight").data += 1  # the base was trained on before it was frozen
    with pytest.raises(UsageError, match=r"not in .*any more.*adapt that"):
        vitarium.save(model, tmp_path / "a.safetensors", trained_only=True)
    assert not (tmp_path / "a.safetensors").exists()


def test_published_weights_are_asked_for_by_name(base, tmp_path, monkeypatch):
    model = adapted(base)
    model.weights_from = "pretrained:"
    asked = {}

    def create(name, **options):
        asked.update(options, name=name)
        return vitarium.load(base) if options.get("pretrained") else vit()

    monkeypatch.setattr("vitarium.catalog.bases.create_model", create)
    vitarium.save(model, tmp_path / "a.safetensors", trained_only=True)
    assert (asked["name"], asked["pretrained"]) == ("timm/vit_pico", True)
    with pytest.raises(CheckpointError, match=r"weights from pretrained: .*in no cache.*checkpoint=FILE.*fetch=True"):
        vitarium.load(tmp_path / "a.safetensors")
    assert torch.equal(vitarium.load(tmp_path / "a.safetensors", fetch=True)(image()), model(image()))
