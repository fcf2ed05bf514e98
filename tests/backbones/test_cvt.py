"""Tests specific to CvT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import assert_matches_golden, fill_value
from vitarium.backbones.cvt import TRANSFORMERS, ConvAttention, CvT
from vitarium.nn import Attention, QuickGELU


def outputs(model: CvT, x: Tensor) -> dict[str, Tensor]:
    maps = model.forward_intermediates(x, intermediates_only=True)
    *_, last = model.forward_stages(x)
    token = {"cls_token": last[:, :1]} if last.ndim == 3 else {}
    return {f"stage{i + 1}": m for i, m in enumerate(maps)} | token | {"logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("cvt-13_224", vitarium.create_model("cvt_13"), outputs)


def test_pooled_projections_without_class_token_equal_the_authors_model():
    model = CvT(
        **dict(dims=(48, 96, 144), depths=(2, 1, 3), num_heads=(1, 2, 3), mlp_ratio=(4.0, 3.0, 2.0), num_classes=12),
        **dict(kv_stride=(4, 2, 2), projection=("dw_bn", "avg", "dw_bn"), qkv_bias=(False, True, False), cls_tokens=(False,) * 3),
    )
    assert_matches_golden("cvt-avg_nocls_160x96", model, outputs)


def test_other_kernels_equal_transformers(tmp_path):
    """Also biases, strides and paddings per stage, and the exact GELU."""
    transformers = pytest.importorskip("transformers")
    options = dict(
        **dict(num_labels=4, embed_dim=[8, 16], depth=[1, 2], num_heads=[1, 2], mlp_ratio=[2.0, 3.0], drop_path_rate=[0.0, 0.0]),
        **dict(patch_sizes=[5, 3], patch_stride=[2, 2], patch_padding=[2, 1], drop_rate=[0.0] * 2, attention_drop_rate=[0.0] * 2),
        **dict(cls_token=[False, True], qkv_bias=[True, False], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[5, 3]),
        **dict(padding_q=[2, 1], padding_kv=[1, 0], stride_kv=[3, 2], stride_q=[1, 1]),
    )
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**options)).eval()
    theirs.load_state_dict({k: fill_value(k, v) for k, v in theirs.state_dict().items()})
    theirs.save_pretrained(tmp_path)
    ours = vitarium.create_model(
        "cvt_13",
        **dict(dims=(8, 16), depths=(1, 2), num_heads=(1, 2), mlp_ratio=(2.0, 3.0), kernels=(5, 3), strides=(2, 2), paddings=(2, 1)),
        **dict(qkv_bias=(True, False), qkv_kernel=(5, 3), kv_padding=(1, 0), kv_stride=(3, 2)),
        act_layer="gelu",
        checkpoint=tmp_path / "model.safetensors",
    ).eval()
    image = torch.randn(2, 3, 30, 44)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.identity
def test_linear_projections_are_plain_attention():
    part = ConvAttention(12, 3, 2, 1, projection="linear", qkv_bias=False).double()
    plain = Attention(12, 3, scale=12**-0.5, qkv_bias=False).double()
    plain.qkv.weight.data = torch.cat([part.proj_q.weight, part.proj_k.weight, part.proj_v.weight]).detach()
    plain.proj.load_state_dict(part.proj.state_dict())
    x = torch.randn(2, 1 + 20, 12, dtype=torch.float64)
    torch.testing.assert_close(part(x, (4, 5)), plain(x), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_class_token_of_an_early_stage_is_seen_and_dropped():
    model = vitarium.create_model("cvt_pico", cls_tokens=(True, False), num_classes=3).eval()
    image = torch.randn(1, 3, 16, 16)
    first, last = model.forward_intermediates(image, intermediates_only=True)
    assert (first.shape, last.shape) == ((1, 24, 8, 8), (1, 48, 4, 4))
    model.stages[0].cls_token.data.normal_()
    assert not torch.equal(model.forward_intermediates(image, intermediates_only=True)[0], first)


@pytest.mark.parametrize(("name", "millions", "within"), [("13", 19.99748, 1e-6), ("21", 32, 0.02), ("w24_384", 277, 0.01)])
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"cvt_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def test_macs():
    from vitarium.efficiency.profiler import count_macs

    with torch.device("meta"):
        model = vitarium.create_model("cvt_13").eval()
    assert count_macs(model, 224) == pytest.approx(4.58e9, rel=0.02)


def reference(model: CvT) -> nn.Module:
    """Build the reference for benchmarks: transformers' class with the activation that the weights were trained with.

    Its random weights are loaded into `model`.
    """
    from transformers import CvtConfig, CvtForImageClassification

    class Logits(CvtForImageClassification):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).logits

    Logits.__module__ = CvtForImageClassification.__module__
    depth, width = ([f(stage) for stage in model.stages] for f in (lambda s: len(s.blocks), lambda s: s.downsample.proj.out_channels))
    theirs = Logits(CvtConfig(num_labels=model.num_classes, depth=depth, embed_dim=width, drop_path_rate=[0.0] * 3)).eval()
    for part in theirs.modules():
        if type(part).__name__ == "CvtIntermediate":
            part.activation = QuickGELU()
    model.load_state_dict(TRANSFORMERS(theirs.state_dict()))
    return theirs


def test_transformers_checkpoints_load():
    ours = vitarium.create_model("cvt_13", num_classes=5).eval()
    theirs = reference(ours)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-3, atol=1e-3)


def plain_projections(part: ConvAttention) -> None:
    """Set convolutions and batch norms to the identity."""
    for name, conv in part.named_modules():
        if name.endswith(".conv"):
            nn.init.zeros_(conv.weight)
            conv.weight.data[:, :, 1, 1] = 1
        if name.endswith(".bn"):
            conv.eps = 0.0


@pytest.mark.identity
@pytest.mark.parametrize("prefix", [0, 1])
def test_with_convolutions_that_pass_on_it_is_plain_attention(prefix: int):
    part = ConvAttention(12, 3, 1, prefix).double().eval()
    plain_projections(part)
    plain = Attention(12, 3, scale=12**-0.5).double()
    plain.qkv.weight.data = torch.cat([part.proj_q.weight, part.proj_k.weight, part.proj_v.weight]).detach()
    plain.qkv.bias.data = torch.cat([part.proj_q.bias, part.proj_k.bias, part.proj_v.bias]).detach()
    plain.proj.load_state_dict(part.proj.state_dict())
    x = torch.randn(2, prefix + 20, 12, dtype=torch.float64)
    torch.testing.assert_close(part(x, (4, 5)), plain(x), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_folded_norms_change_nothing():
    model = vitarium.create_model("cvt_pico").double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    image = torch.randn(2, 3, 33, 20, dtype=torch.float64)
    expected = model.eval()(image)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.fuse().modules())
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_keys_of_a_coarser_grid_cost_a_quarter():
    part = ConvAttention(12, 3, 2, 1).double().eval()
    seen = []
    part.proj_k.register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    part(torch.randn(1, 1 + 35, 12, dtype=torch.float64), (5, 7))
    assert seen == [1 + 3 * 4]


def test_only_the_last_stage_drops_paths():
    model = vitarium.create_model("cvt_21", drop_path_rate=0.1)
    rates = [[block.drop_path.drop_prob for block in stage.blocks] for stage in model.stages]
    assert rates[0] == [0.0]
    assert rates[1] == [0.0] * 4
    assert rates[2][0] == 0.0
    assert rates[2][-1] == pytest.approx(0.1)


def test_other_poolings():
    model = vitarium.create_model("cvt_pico", num_classes=0).eval()
    image = torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(image)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(image), tokens[:, 1:].mean(1))


def test_refuses():
    with pytest.raises(ValueError, match="one value per stage"):
        vitarium.create_model("cvt_pico", depths=(1,))
    for options, words in (
        (dict(projection="conv"), "dw_bn, avg, linear"),
        (dict(qkv_kernel=4), "try 5"),
        (dict(act_layer="relu"), "gelu"),
    ):
        with pytest.raises(ValueError, match=words):
            vitarium.create_model("cvt_pico", **options)
