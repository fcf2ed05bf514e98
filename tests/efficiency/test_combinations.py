"""Token reduction times quantization or pruning times models of three libraries: each combination runs, and has the same outputs after
saving and loading.

The models are the libraries' own at their own widths, cut to two blocks and 64 patches or fewer. `--record-evidence` writes the table of
the docs (docs/examples/combinations.json).
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import vitarium
from vitarium.catalog.methods import parse_method
from vitarium.efficiency.quantization.mptq_vit import MPTQ

REDUCERS = {"EViT": "evit:keep=0.7,blocks=[1]", "PiToMe": "pitome:keep=0.9", "ToMe": "tome:r=4"}
SMALLER = ("MPTQ 8/8", "4-bit weights", "pruned 50 %")
MODELS = {
    "timm DeiT-Ti": ("timm/deit_tiny_patch16_224", dict(depth=2, image_size=96)),
    "timm DINOv2-S": ("timm/vit_small_patch14_dinov2", dict(depth=2, image_size=112, num_classes=10)),
    "transformers ViT": ("hf/FOLDER", dict()),
}
CALIBRATION = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(1))


@functools.cache
def transformers_folder(folder: Path) -> Path:
    """A ViT of transformers with ViT-Ti's width, written to disk."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=96, num_labels=10
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def build(model: str, folder: Path) -> nn.Module:
    name, arguments = MODELS[model]
    torch.manual_seed(0)
    if name.startswith("hf/"):
        return vitarium.create_model(f"hf/{transformers_folder(folder)}", pretrained=True).eval()
    return vitarium.create_model(name, **arguments).eval()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vit")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("smaller", SMALLER)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_runs_is_saved_and_says_the_same(
    reducer: str, smaller: str, model: str, tmp_path: Path, shared: Path, request: pytest.FixtureRequest
):
    built = build(model, shared)
    side = built.preprocessing.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        before = built(images)
    reduce = parse_method(REDUCERS[reducer])
    if smaller == "pruned 50 %":
        methods = [parse_method("sparse_prune:structure=both,amount=0.5"), reduce]
    elif smaller == "MPTQ 8/8":
        methods = [reduce, MPTQ(bits=8, search="mse", images=4, calibration=CALIBRATION[..., :side, :side])]
    else:
        methods = [reduce, parse_method("int4w")]
    vitarium.apply(built, *methods, example=images[:1], quiet=True)
    first, last = built.methods[0], built.methods[-1]
    with torch.inference_mode():
        after = built(images)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    assert last.macs_after < first.macs_before
    assert last.bytes_after < first.bytes_before
    path = tmp_path / "smaller.safetensors"
    vitarium.save(built, path)
    loaded = vitarium.load(path)
    with torch.inference_mode():
        again = loaded(images)
    assert torch.equal(again, after)
    assert [r.method.slug for r in loaded.methods] == [m.slug for m in methods]
    row = dict(
        reducer=reducer,
        smaller=smaller,
        model=model,
        macs=last.macs_after / first.macs_before,
        bytes=last.bytes_after / first.bytes_before,
        file=path.stat().st_size / first.bytes_before,
    )
    request.node.user_properties.append(("combination", row))
    if smaller != "pruned 50 %" or first.can_undo:
        vitarium.undo(built)
        with torch.inference_mode():
            assert torch.equal(built(images), before)
