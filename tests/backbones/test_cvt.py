"""Tests specific to CvT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.cvt import TRANSFORMERS, ConvAttention, CvT
from vitarium.nn import Attention, QuickGELU


def outputs(model: CvT, x: Tensor) -> dict[str, Tensor]:
    maps = model.forward_intermediates(x, intermediates_only=True)
    *_, last = model.forward_stages(x)
    return {f"stage{i + 1}": m for i, m in enumerate(maps)} | {"cls_token": last[:, :1], "logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("cvt-13_224", vitarium.create_model("cvt_13"), outputs)


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
