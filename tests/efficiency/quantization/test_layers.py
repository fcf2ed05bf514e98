"""Packed layers: equality of integer and floating-point computation, in memory and from a file, with other methods and in other libraries'
models."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.anatomy.models import TRANSFORMERS, fill
from vitarium.efficiency.quantization.layers import Packed, PerToken, QuantizedConv, QuantizedLinear, Static, find_layers
from vitarium.efficiency.quantization.mptq_vit import MPTQ, TwoRegion
from vitarium.efficiency.quantization.ranges import Observer, asymmetric_step, search_step, squared_error, symmetric_step
from vitarium.errors import UsageError
from vitarium.ops.number_formats import Float, Integer, parse_format

INPUTS = {
    "static": lambda x: Static.of(Integer(8), symmetric_step(x.abs().max(), 8)),
    "static 5 bits": lambda x: Static.of(Integer(5), symmetric_step(x.abs().max(), 5)),
    "token": lambda x: PerToken(8),
    "two regions": lambda x: TwoRegion.of(x, 6),
}


@pytest.mark.identity
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("kind", INPUTS)
def test_the_integer_product_is_what_is_simulated(kind, groups, bits):
    """In float64 the simulation's sums are exact up to the last rounding."""
    layer, x = nn.Linear(20, 12).double(), torch.randn(2, 7, 20, dtype=torch.float64)
    weight = layer.weight.detach().reshape(groups, -1)
    packed = Packed.of(layer.weight, Integer(bits), symmetric_step(weight.abs().amax(1), bits))
    quantized = QuantizedLinear.of(layer, packed, INPUTS[kind](x)).double()
    assert not quantized.simulated
    with torch.no_grad():
        by_integers = quantized(x)
    by_floats = F.linear(quantized.activation(x), quantized.weight, layer.bias)
    torch.testing.assert_close(by_integers, by_floats, rtol=0, atol=1e-13)
    assert torch.equal(quantized(x.clone().requires_grad_()), by_floats)


@pytest.mark.parametrize("name", ["int4", "uint4", "e2m1", "e4m3"])
def test_any_format_can_be_packed(name):
    layer, format = nn.Linear(16, 6), parse_format(name)
    rows = layer.weight.detach().view(12, 8)  # groups of 8 inputs
    low, high = rows.aminmax(dim=1)
    zero = None
    if isinstance(format, Float):
        step = rows.abs().amax(1) / format.largest
    else:
        step, zero = asymmetric_step(low, high, 4)
        zero = zero if name == "uint4" else None
    packed = Packed.of(layer.weight, format, step, zero)
    assert packed.codes.numel() == 16 * 6 * format.bits // 8
    want = format.quantize(rows, step[:, None], None if zero is None else zero[:, None]).view(6, 16)
    assert torch.equal(packed(), want)
    quantized = QuantizedLinear.of(layer, packed, PerToken(8))
    assert quantized.simulated
    x = torch.randn(3, 16)
    assert torch.equal(quantized(x), F.linear(quantized.activation(x), want, layer.bias))


def test_convolutions_keep_their_geometry():
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9, 9)
    packed = Packed.of(layer.weight, Integer(8), symmetric_step(layer.weight.detach().flatten(1).abs().amax(1), 8))
    torch.testing.assert_close(QuantizedConv.of(layer, packed)(x), layer(x), rtol=0, atol=0.02)


def test_observers():
    batches = [torch.randn(5, 3) for _ in range(4)]
    seen, average, share = Observer(-1), Observer(momentum=0.1), Observer(share=0.9)
    for x in batches:
        seen(x)
        average(x)
        share(x)
    assert torch.equal(seen.high, torch.cat(batches).amax(0))
    assert torch.equal(seen.amax, torch.cat(batches).abs().amax(0))
    want = batches[0].max()
    for x in batches[1:]:
        want = want + 0.1 * (x.max() - want)
    torch.testing.assert_close(average.high, want[None])
    assert share.high < torch.cat(batches).max()
    with pytest.raises(UsageError, match="has not observed any"):
        _ = Observer().low


def test_search_finds_the_best_step_of_every_group():
    x = torch.randn(3, 400, dtype=torch.float64)
    first = symmetric_step(x.abs().amax(1, keepdim=True), 4)
    best = search_step(first, lambda s: squared_error(x, Integer(4).quantize(x, s), 0))
    for row in range(3):
        errors = [squared_error(x[row], Integer(4).quantize(x[row], first[row] * (0.01 + 1.19 * i / 100))) for i in range(100)]
        assert squared_error(x[row], Integer(4).quantize(x[row], best[row])) == min(errors)


def test_int8_is_as_near_as_torchaos():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64), torch.randn(40, 256)
    want, ours, theirs = layer(x).detach(), nn.Sequential(layer), nn.Sequential(nn.Linear(256, 64))
    theirs.load_state_dict(ours.state_dict())
    torchao.quantize_(theirs, torchao.Int8DynamicActivationInt8WeightConfig())
    vitarium.apply(ours, "int8", quiet=True)
    with torch.no_grad():
        assert (ours(x) - want).norm() < 1.05 * (theirs(x) - want).norm() < 0.02 * want.norm()


# ---- in combination, and from a file


def small(kind: str, folder) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(num_classes=5, image_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2)
    if kind == "timm DeiT":
        return fill(vitarium.create_model("timm/deit_tiny_distilled_patch16_224", **sizes))
    if kind == "timm DINOv2":
        return fill(vitarium.create_model("timm/vit_small_patch14_dinov2", **sizes))
    if kind == "transformers ViT":
        config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **TRANSFORMERS}
        folder.joinpath("config.json").write_text(json.dumps(config))
        return fill(vitarium.create_model(f"hf/{folder}", num_classes=5))
    return fill(vitarium.create_model(kind, num_classes=5))


QUANTIZERS = {
    "MPTQ 8/8": lambda x: MPTQ(search="mse", calibration=x),
    "MPTQ 4/8, attention": lambda x: MPTQ(weight_bits=4, attention=True, search="mse", calibration=x),
    "4-bit weights": lambda x: "int4w",
    "int8": lambda x: "int8",
}


@pytest.mark.parametrize("kind", ["timm DeiT", "timm DINOv2", "transformers ViT"])
@pytest.mark.parametrize("reducer", ["evit:keep=0.7", "pitome:keep=0.9", "tome:r=2"])
def test_after_token_reductions_it_saves_and_predicts_the_same(kind, reducer, tmp_path):
    for quantizer in QUANTIZERS.values():
        model, images = small(kind, tmp_path), torch.randn(4, 3, 16, 16)
        vitarium.apply(model, reducer, quantizer(images), quiet=True)
        assert_survives(model, images, tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", ["swin_pico", "convnext_pico", "uniformer_pico"])
def test_our_models_save_and_predict_the_same(kind, tmp_path):
    for name, quantizer in QUANTIZERS.items():
        model = small(kind, tmp_path)
        images = torch.randn(4, model.preprocessing.channels, *2 * (model.preprocessing.image_size,))
        if "attention" not in name:
            vitarium.apply(model, quantizer(images), quiet=True)
            assert_survives(model, images, tmp_path / "m.safetensors")


def assert_survives(model: nn.Module, images: Tensor, path) -> None:
    vitarium.save(model, path)
    loaded = vitarium.load(path)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert [str(r.method) for r in loaded.methods] == [str(r.method) for r in model.methods]
    with pytest.raises(UsageError, match="cannot be undone"):
        vitarium.undo(loaded)


def test_a_layer_of_four_bits_is_half_a_byte_a_weight_in_the_file(tmp_path):
    model = vitarium.create_model(
        "timm/vit_tiny_patch16_224", num_classes=5, image_size=16, patch_size=4, embed_dim=96, depth=2, num_heads=2
    )
    linear = sum(m.weight.numel() for m in find_layers(model, convolutions=False).values())
    vitarium.save(model, tmp_path / "a.safetensors")
    vitarium.save(vitarium.apply(model, "int4w", quiet=True), tmp_path / "b.safetensors")
    saved = (tmp_path / "a.safetensors").stat().st_size - (tmp_path / "b.safetensors").stat().st_size
    assert 0.95 * 3.5 * linear < saved < 3.5 * linear  # the rest: steps, and more names


def test_compiles_without_a_break():
    model = small("timm DeiT", None)
    images = torch.randn(2, 3, 16, 16)
    vitarium.apply(model, MPTQ(search="mse", calibration=images), quiet=True)
    with torch.no_grad():
        want = model.eval()(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), want, rtol=1e-4, atol=1e-4)
