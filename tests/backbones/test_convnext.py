"""Tests specific to ConvNeXt; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.convnext import ConvNeXtBlock, ConvNeXtIsotropic
from vitarium.nn import Backbone, LayerNorm2d


def pyramid(model: Backbone, x: Tensor) -> dict[str, Tensor]:
    features, maps = model.forward_intermediates(x)
    stages = {f"stage{i + 1}": m for i, m in enumerate(maps)}
    return stages | {"features": model.forward_head(features, pre_logits=True), "logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("convnext-tiny_224", vitarium.create_model("convnext_tiny"), pyramid)


def test_isotropic_equals_the_authors_model():
    model = ConvNeXtIsotropic(dim=192, depth=6, num_classes=100)
    run = lambda m, x: {"stem": m.stem(x), "map": m.forward_features(x), "logits": m(x)}
    assert_matches_golden("convnext-iso_d192_160", model, run)


@pytest.mark.parametrize("name", ["convnext_pico", "convnext_iso_pico"])
def test_layer_scale_takes_whole_numbers_and_zero_leaves_it_out(name: str):
    ones = vitarium.create_model(name, layer_scale_init_value=1, num_classes=3)
    gammas = [p for n, p in ones.named_parameters() if n.endswith("gamma")]
    assert gammas
    assert all(p.is_floating_point() and torch.equal(p, torch.ones_like(p)) for p in gammas)
    none = vitarium.create_model(name, layer_scale_init_value=0, num_classes=3)
    assert not any(n.endswith("gamma") for n, _ in none.named_parameters())
    none.load_state_dict({n: t for n, t in ones.state_dict().items() if not n.endswith("gamma")})
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(none(x), ones(x))
    with pytest.raises(ValueError, match="at least 0"):
        vitarium.create_model(name, layer_scale_init_value=-1)


def test_detectors_files_load_with_a_norm_per_stage(tmp_path):
    """The authors' detectors have norm0 to norm3 on the maps of the stages and neither a norm after pooling nor a head."""
    source = vitarium.create_model("convnext_pico", num_classes=0, stage_norms=True).eval()
    for norm in source.stage_norms:
        nn.init.normal_(norm.weight)
    names = {}
    for name, tensor in source.state_dict().items():
        theirs = name.replace("stage_norms.", "norm").replace(".blocks.", ".").replace("mlp.fc", "pwconv")
        theirs = theirs.replace("stem.conv", "downsample_layers.0.0").replace("stem.norm", "downsample_layers.0.1")
        theirs = theirs.replace("stages.1.downsample.norm", "downsample_layers.1.0")
        names["backbone." + theirs.replace("stages.1.downsample.conv", "downsample_layers.1.1")] = tensor
    torch.save({"state_dict": names | {"neck.fpn_convs.0.conv.weight": torch.zeros(3)}}, tmp_path / "mask_rcnn.pth")
    model = vitarium.create_model("convnext_pico", num_classes=0, stage_norms=True, checkpoint=tmp_path / "mask_rcnn.pth").eval()
    x = torch.randn(1, 3, 16, 16)
    maps = model.forward_intermediates(x, intermediates_only=True)
    plain = list(super(type(model), model).forward_stages(x))
    assert torch.equal(maps[0], source.stage_norms[0](plain[0]))
    assert torch.equal(maps[1], source.stage_norms[1](plain[1]))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 28.589128),
        ("small", 50.22),
        ("base", 88.59),
        ("large", 197.77),
        ("xlarge", 350.20),
        ("iso_small", 22.3),
        ("iso_base", 87.1),
        ("iso_large", 305.9),
    ],
)
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"convnext_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.identity
def test_block_equals_its_channels_first_form():
    """Linear layers on (B, H, W, C) are 1 x 1 convolutions on (B, C, H, W)."""
    block = ConvNeXtBlock(8, 7, 4.0, 0.5, 0.0).double().eval()
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    y = block.dwconv(x)
    centred = y - y.mean(1, keepdim=True)
    y = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    y = y * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    y = F.gelu(F.conv2d(y, block.mlp.fc1.weight[:, :, None, None], block.mlp.fc1.bias))
    y = F.conv2d(y, block.mlp.fc2.weight[:, :, None, None], block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), x + block.gamma[:, None, None] * y, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_without_gamma_only_stem_and_downsampling_remain():
    model = vitarium.create_model("convnext_pico").double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.zeros_(parameter)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model.stem(image)
    for stage in model.stages:
        expected = stage.downsample(expected)
    torch.testing.assert_close(model.forward_features(image), expected)


@pytest.mark.identity
def test_channels_first_norm_is_the_permuted_norm():
    norm = LayerNorm2d(6).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(norm(x), F.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias).permute(0, 3, 1, 2))


@pytest.mark.identity
def test_moving_the_image_by_a_stride_moves_the_last_map_by_a_cell():
    model = vitarium.create_model("convnext_pico", depths=(1, 1), kernel_size=3).double().eval()
    stride = model.feature_info[-1]["reduction"]
    image = torch.randn(1, 3, 16 * stride, 16 * stride, dtype=torch.float64)
    maps = model.forward_features(image), model.forward_features(image.roll(stride, -1))
    inside = slice(4, -4)
    torch.testing.assert_close(maps[1][..., inside, inside], maps[0].roll(1, -1)[..., inside, inside])


def test_layer_decay_follows_the_authors_table():
    layer = vitarium.create_model("convnext_small").group_matcher()
    expected = {
        "stem.conv.weight": 0,
        "stages.0.blocks.2.gamma": 1,
        "stages.1.downsample.conv.weight": 2,
        "stages.1.blocks.0.dwconv.weight": 2,
        "stages.2.downsample.norm.bias": 3,
        "stages.2.blocks.0.mlp.fc1.weight": 3,
        "stages.2.blocks.26.mlp.fc1.weight": 11,
        "stages.3.downsample.conv.bias": 12,
        "stages.3.blocks.2.norm.weight": 12,
        "head_norm.weight": 13,
        "head.weight": 13,
    }
    assert {name: layer(name) for name in expected} == expected


def test_macs():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = vitarium.create_model("convnext_tiny").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(4.46e9, rel=0.01)


def test_head_starts_small_for_fine_tuning():
    torch.manual_seed(0)
    plain = vitarium.create_model("convnext_pico").head.weight
    torch.manual_seed(0)
    small = vitarium.create_model("convnext_pico", head_init_scale=0.001).head.weight
    torch.testing.assert_close(small, plain * 0.001)


def test_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="must be odd"):
        vitarium.create_model("convnext_pico", kernel_size=4)
