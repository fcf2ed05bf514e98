"""Example inputs exist for every registered model, and code that runs arbitrary models uses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from vitarium.catalog import families
from vitarium.catalog.calling import arguments, call, example_image, example_inputs, inputs_of
from vitarium.catalog.probe import macs_of
from vitarium.efficiency.profiler import count_macs, peak_memory, profile
from vitarium.errors import AttachError, InputError, UsageError

SMALL = [f"{f.name}_pico" if "pico" in f.variants else f"{f.name}_{next(iter(f.variants))}" for f in families()]


def floats(output: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("name", SMALL)
def test_every_registered_model_is_called_with_its_own_examples(name: str):
    torch.manual_seed(0)
    model = vitarium.create_model(name).eval()
    inputs = model.example_inputs(2)
    again = example_inputs(model, 2)
    assert list(inputs) == list(again)
    assert all(torch.equal(inputs[key], again[key]) and len(inputs[key]) == 2 for key in inputs)
    with torch.no_grad():
        first, second = floats(call(model, inputs)), floats(call(model, inputs))
    assert first
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = example_inputs(model, 2, seed=1)
    assert not torch.equal(next(iter(other.values())), next(iter(inputs.values())))
    assert min(count_macs(model), macs_of(model, example_inputs(model))) > 0


def test_values_lie_in_the_model_s_range():
    dit = example_inputs(vitarium.create_model("dit_pico", num_classes=3), 64)
    assert list(dit) == ["x", "t", "labels"]
    assert dit["x"].shape == (64, 3, 16, 16)
    assert dit["labels"].dtype == torch.int64
    assert 0 <= dit["labels"].min() < dit["labels"].max() < 3
    assert 1 < dit["t"].max() <= 999  # numbers of steps
    assert dit["t"].min() >= 0
    flow = example_inputs(vitarium.create_model("sit_flow_pico"), 64)
    assert 0 <= flow["t"].min() < flow["t"].max() < 1
    var = example_inputs(vitarium.create_model("var_pico"), 64)
    assert list(var) == ["image", "labels"]
    assert -1 <= var["image"].min() < -0.9
    assert 0.9 < var["image"].max() <= 1
    restorer = example_inputs(vitarium.create_model("drct_pico"), 2)["image"]
    assert 0 <= restorer.min() < restorer.max() <= 1
    assert example_inputs(vitarium.create_model("uniformer_video_pico"))["image"].ndim == 5
    assert list(example_inputs(vitarium.create_model("thorax_mae_pretrain_pico"))) == ["image", "noise"]


def test_latents_other_sizes_dtypes_and_devices():
    with torch.device("meta"):
        model = vitarium.create_model("dit_s_4")
    inputs = example_inputs(model, 3, 128)
    assert inputs["x"].shape == (3, 4, 16, 16)
    assert {value.device.type for value in inputs.values()} == {"meta"}
    half = vitarium.create_model("sit_flow_pico").bfloat16()
    assert example_inputs(half)["x"].dtype == torch.bfloat16
    assert example_image(vitarium.create_model("swin_pico"), 2, (32, 48)).shape == (2, 3, 32, 48)
    with pytest.raises(UsageError, match="8 divides, got 100x100"):
        example_inputs(model, 1, 100)
    with pytest.raises(UsageError, match="16x16 pixels alone, got image_size=32"):
        example_inputs(vitarium.create_model("var_pico"), 1, 32)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        example_inputs(half, 0)


def test_models_of_other_libraries():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2)
    inputs = example_inputs(model, 2)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"x": (2, 3, 32, 32)}
    assert call(model, inputs).shape == (2, 1000)


def clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = dict(**small, vocab_size=60, max_position_embeddings=12, eos_token_id=59, bos_token_id=58, pad_token_id=1)
    vision = dict(**small, image_size=16, patch_size=4)
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def test_a_clip_of_transformers_takes_two_inputs():
    model = clip()
    inputs = example_inputs(model, 3)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (3, 12),
        "pixel_values": (3, 3, 16, 16),
        "attention_mask": (3, 12),
    }
    assert inputs["input_ids"].max() == 59
    assert call(model, inputs).logits_per_image.shape == (3, 3)
    assert count_macs(model) > 0
    cost = profile(model, batch=2, runs=1)
    assert cost.macs == count_macs(model)
    assert vitarium.apply(model, "int8", quiet=True).methods[0].macs_before == cost.macs
    assert call(model, inputs).logits_per_image.shape == (3, 3)


def test_a_model_that_cannot_be_called_says_why():
    with pytest.raises(UsageError, match=r"the input of a Sequential is not known.*forward takes input"):
        example_inputs(nn.Sequential(nn.Linear(3, 3)))
    model = vitarium.create_model("dit_pico")
    with pytest.raises(InputError, match="DiT is called with x, t, labels; got no 't'"):
        call(model, {"x": torch.zeros(1, 3, 16, 16)})
    with pytest.raises(InputError, match="got 'image' among the inputs"):
        call(model, {"image": 0, "x": 0, "t": 0})
    with pytest.raises(UsageError, match="called with one image; a DiT takes x, t, labels"):
        example_image(model)
    with pytest.raises(AttachError, match="the input of a Sequential is not known"):
        vitarium.apply(nn.Sequential(vitarium.nn.Mlp(8, 32)), "sparse_prune:structure=channels", quiet=True)


class Keywords(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None, *, c: Tensor) -> Tensor:
        return a + c


def test_as_many_inputs_as_possible_are_positional():
    a, c = torch.ones(2), torch.zeros(2)
    assert arguments(Keywords(), {"c": c, "a": a}) == ((a,), {"c": c})
    assert call(Keywords(), {"a": a, "c": c}).sum() == 2
    compiled = torch.compile(vitarium.create_model("dit_pico").eval(), backend="eager")
    inputs = example_inputs(compiled, 2)
    assert torch.equal(call(compiled, inputs), call(compiled._orig_mod, inputs))


def test_the_fields_of_a_batch_that_a_model_takes():
    batch = {"x": 1, "t": 2, "labels": 3, "index": 4}
    assert inputs_of(vitarium.create_model("dit_pico"), batch) == {"x": 1, "t": 2, "labels": 3}
    assert inputs_of(vitarium.create_model("timm/vit_pico"), {"image": 1, "target": 2}) == {"x": 1}
    with pytest.raises(InputError, match=r"called with x, t, and the batch has the fields image, target.*example_inputs"):
        inputs_of(vitarium.create_model("dit_pico"), {"image": 1, "target": 2})


@pytest.mark.parametrize("name", ["dit_pico", "var_pico", "kmax_deeplab_pico", "uniformer_video_pico", "drct_pico", "swin_pico"])
def test_costs_and_methods_on_models_of_many_inputs(name: str):
    torch.manual_seed(0)
    model = vitarium.create_model(name).eval()
    inputs = example_inputs(model, 2)
    assert peak_memory(model, inputs) > sum(p.numel() * p.element_size() for p in model.parameters())
    before = floats(call(model, inputs))
    report = vitarium.apply(model, "sparse_prune:amount=0.3", quiet=True).methods[0]
    assert report.macs_before == count_macs(model) > 0
    vitarium.undo(model)
    assert all(torch.equal(a, b) for a, b in zip(before, floats(call(model, inputs)), strict=True))


def test_a_denoiser_is_calibrated_on_its_named_inputs():
    torch.manual_seed(0)
    model = vitarium.create_model("dit_pico").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # its last layer begins at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    inputs = example_inputs(model, 6)
    with torch.no_grad():
        wanted = call(model, inputs)
    from vitarium.efficiency.quantization.mptq_vit import MPTQ

    vitarium.apply(model, MPTQ(bits=8, search="mse", smooth="none", calibration=[inputs]), quiet=True)
    with torch.no_grad():
        error = (call(model, inputs) - wanted).std() / wanted.std()
    assert 0 < error < 0.1
    with pytest.raises(UsageError, match=r"calibrate it on mappings with fields of these names|called with x, t"):
        vitarium.apply(vitarium.create_model("dit_pico"), MPTQ(calibration=torch.randn(2, 3, 16, 16)), quiet=True)
