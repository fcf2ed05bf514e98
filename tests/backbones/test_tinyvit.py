"""Tests specific to TinyViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import assert_matches_golden, fill_value
from vitarium.backbones.tinyvit import TIMM, DistanceBias, TinyViT


def outputs(model: TinyViT, x: Tensor) -> dict[str, Tensor]:
    last, maps = model.forward_intermediates(x)
    named = {f"stage{i + 1}": m if i == 0 else m.flatten(2).transpose(1, 2) for i, m in enumerate(maps)}
    features = model.forward_head(last, pre_logits=True)
    return named | {"stem": model.patch_embed(x), "features": features, "logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("tinyvit-5m_224", vitarium.create_model("tinyvit_5m"), outputs)


def test_other_heads_kernels_and_windows_equal_the_authors_model():
    model = TinyViT(
        **dict(dims=(32, 48, 96, 128), depths=(1, 2, 2, 1), window_sizes=(5, 6, 3), num_classes=21),
        **dict(num_heads=(2, 3, 4), mlp_ratio=3.0, expand_ratio=4.0, local_conv_size=5),
    )
    assert_matches_golden("tinyvit-pad_128", model, outputs)


@pytest.mark.parametrize(
    ("name", "millions", "within"), [("5m", 5.392764, 1e-6), ("11m", 11.0, 1e-3), ("21m", 21.2, 1e-3), ("21m_384", 21.2, 0.01)]
)
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"tinyvit_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def filled(model: nn.Module) -> nn.Module:
    """Fill every tensor by its name, as in the goldens."""
    model.load_state_dict({name: fill_value(name, tensor) for name, tensor in model.state_dict().items()})
    return model


@pytest.mark.parametrize("size", [64, 100])
def test_equals_timms_model(size: int):
    """Also for padded maps."""
    import timm

    arguments = dict(embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1), window_sizes=(4, 4, 6, 3), num_classes=5)
    theirs = filled(timm.create_model("tiny_vit_5m_224", **arguments)).double().eval()
    ours = vitarium.create_model("tinyvit_5m", dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), window_sizes=(4, 6, 3), num_classes=5)
    ours.double().eval().load_state_dict(TIMM(theirs.state_dict()))
    image = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-11)


@pytest.mark.identity
def test_the_bias_is_one_number_a_distance():
    part = DistanceBias(4, 2)
    nn.init.normal_(part.table)
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    apart = (place[:, None] - place).abs()
    bias = part(4)
    assert torch.equal(bias, bias.transpose(1, 2))
    assert torch.equal(bias, part.table[:, 4 * apart[..., 0] + apart[..., 1]])


@pytest.mark.identity
def test_folded_norms_change_nothing():
    model = filled(vitarium.create_model("tinyvit_pico")).double()
    image = torch.randn(2, 3, 33, 20, dtype=torch.float64)
    expected = model.eval()(image)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.fuse().modules())
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-11)


@pytest.mark.identity
def test_a_fresh_bottleneck_is_its_activation():
    block = vitarium.create_model("tinyvit_pico").eval().stages[0].blocks[0]
    x = torch.randn(1, 16, 5, 6)
    assert torch.equal(block(x), nn.functional.gelu(x))


def test_a_table_for_another_window():
    model = vitarium.create_model("tinyvit_pico", window_sizes=(8, 4))
    name, table = "stages.1.blocks.0.attn.position_bias.table", torch.arange(16.0).repeat(2, 1)
    resized = model.resize_tensor(name, table, torch.Size((2, 64)))
    assert resized is not None
    assert resized.shape == (2, 64)
    assert torch.equal(model.resize_tensor(name, table, torch.Size((2, 16))), table)
    assert model.resize_tensor("head.weight", table, torch.Size((2, 64))) is None


@pytest.mark.parametrize(
    ("options", "words"), [(dict(depths=(1,)), "one value per stage"), (dict(dims=(16, 40, 64)), "divisible by head_dim=16")]
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("tinyvit_pico", **options)
