"""Tests specific to ConViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitarium
from tests.golden import RESULTS, assert_matches_golden, compare
from vitarium.backbones.convit import GPSA, ConViT, non_locality, relative_positions
from vitarium.nn import Attention


def outputs(model: ConViT, x: Tensor) -> dict[str, Tensor]:
    first = model.blocks[0]
    grid = model.patch_embed.grid(*x.shape[-2:])
    tokens = model.patch_embed(x).flatten(2).transpose(1, 2) + model.positions(grid)
    features, maps = model.forward_intermediates(x)
    return {
        "gpsa0_attention": first.attn.attention(first.norm1(tokens), grid),
        "before_cls": maps[model.local_up_to_layer - 1].flatten(2).transpose(1, 2),
        "features": model.forward_head(features, pre_logits=True),
        "logits": model(x),
    }


def test_equals_the_authors_model():
    assert_matches_golden("convit-tiny_224", vitarium.create_model("convit_tiny"), outputs)


def test_without_positions_and_with_biases_it_equals_the_authors_model():
    model = ConViT(
        **dict(embed_dim=144, depth=4, num_heads=9, local_up_to_layer=3, locality_strength=0.5, image_size=128, num_classes=13),
        **dict(qkv_bias=True, pos_embed=False),
    )
    assert_matches_golden("convit-nopos_h9_128", model, outputs)


def test_begins_as_the_authors_model_does():
    found = {"rel_indices": relative_positions(6, 6)}
    for heads in (4, 9):
        part = GPSA(8 * heads, heads).double()
        found |= {
            f"pos_proj_weight_h{heads}": part.pos_proj.weight,
            f"v_weight_h{heads}": part.v.weight,
            f"position_attention_h{heads}": part.position_attention((6, 6)),
        }
    error = compare("convit-local_init", found)
    assert error < 2e-6  # the authors' softmax was recorded in float32: 1e-7 of a maximum of 0.5
    RESULTS.append(("convit-local_init", error))


def test_equals_timms_model():
    import timm

    ours = vitarium.create_model("convit_tiny", image_size=64, num_classes=7)
    theirs = timm.create_model("convit_tiny", img_size=64, num_classes=7)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(image), theirs.eval()(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 5.710512), ("small", 27.78), ("base", 86.54)])
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"convit_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.identity
def test_the_gate_shut_is_ordinary_attention():
    part, plain = GPSA(12, 3).double(), Attention(12, 3, qkv_bias=False).double()
    plain.qkv.weight.data = torch.cat([part.qk.weight, part.v.weight]).detach()
    plain.proj.load_state_dict(part.proj.state_dict())
    torch.nn.init.constant_(part.gating_param, -1e4)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    torch.testing.assert_close(part(x, (4, 5)), plain(x), rtol=0, atol=1e-12)


@pytest.mark.identity
@pytest.mark.parametrize("heads", [4, 9])
def test_the_gate_open_and_narrow_is_a_convolution(heads: int):
    """Each head returns its channels of the token at its offset, or for even kernels the mean of four tokens."""
    part = GPSA(4 * heads, heads, locality=50.0).double()
    torch.nn.init.constant_(part.gating_param, 1e4)
    side, centre = (2, 0.5) if heads == 4 else (3, 1)
    x = torch.randn(1, 64, 4 * heads, dtype=torch.float64)
    image = x.view(8, 8, heads, 4)
    expected = torch.zeros(4, 4, heads, 4, dtype=torch.float64)  # of the tokens 2..5, 2..5
    for head in range(heads):
        weights = part.pos_proj.weight.detach()[head]
        dx, dy = (float(w / 100) for w in weights[:2])
        assert abs(dx) <= side - 1 - centre + 1e-9
        near = [(y, x_) for y in {int(dy // 1), int(-(-dy // 1))} for x_ in {int(dx // 1), int(-(-dx // 1))}]
        for y, x_ in near:
            expected[:, :, head] += image[2 + y : 6 + y, 2 + x_ : 6 + x_, head] / len(near)
    expected = part.proj(expected.flatten(2))
    torch.testing.assert_close(part(x, (8, 8)).view(8, 8, -1)[2:6, 2:6], expected, rtol=0, atol=1e-6)


@pytest.mark.identity
def test_rows_of_attention_sum_to_one_and_the_fast_form_is_its_product():
    part = GPSA(12, 3).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    attention = part.attention(x, (4, 5))
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    values = part.v(x).view(2, 20, 3, 4).transpose(1, 2)
    torch.testing.assert_close(part(x, (4, 5)), part.proj((attention @ values).transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_position_attention_moves_with_the_token():
    near = GPSA(36, 9, locality=3.0).double().position_attention((9, 9)).view(9, 9, 9, 9, 9)  # head, query, key
    torch.testing.assert_close(near[:, 3, 3, 1:6, 1:6], near[:, 5, 4, 3:8, 2:7], rtol=0, atol=1e-9)


def test_begins_more_local_than_attention_by_content():
    part = GPSA(32, 4).double()
    x = torch.randn(2, 64, 32, dtype=torch.float64)
    gated = non_locality(part.attention(x, (8, 8)), (8, 8))
    torch.nn.init.constant_(part.gating_param, -1e4)
    free = non_locality(part.attention(x, (8, 8)), (8, 8))
    assert gated.shape == (4,)
    assert (gated < 0.7 * free).all()
    model = vitarium.create_model("convit_pico")
    assert model.gates().shape == (3, 4)
    torch.testing.assert_close(model.gates(), torch.full((3, 4), 0.7311), rtol=1e-4, atol=1e-4)


def test_refuses_to_leave_no_block_for_the_class_token():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        vitarium.create_model("convit_pico", local_up_to_layer=4)
