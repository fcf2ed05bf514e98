"""Tests specific to TNT and PyramidTNT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.tnt import TNT, PyramidTNT, from_timm
from vitarium.catalog import find_model


def outputs(model: TNT, x: Tensor) -> dict[str, Tensor]:
    words, sentences = model.forward_levels(x)
    return {"words0": model.patch_embed(x)[0], "words": words, "sentences": sentences, "logits": model(x)}


def pyramid_outputs(model: PyramidTNT, x: Tensor) -> dict[str, Tensor]:
    return {"features": model.pool(model.forward_features(x)), "logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("tnt-s_patch16_224", vitarium.create_model("tnt_s_patch16"), outputs, merged=196 * 384)  # an unused tensor


def test_equals_the_authors_pyramid():
    assert_matches_golden("tnt-pyramid_ti_192", vitarium.create_model("tnt_pyramid_ti"), pyramid_outputs)


def test_equals_timms_model():
    import timm

    theirs = timm.create_model("tnt_s_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    ours = vitarium.create_model("tnt_s_patch16", image_size=64, depth=2, num_classes=5).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours.load_state_dict(from_timm(theirs.state_dict()))
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *(("tnt_s_patch16", 23.768584), ("tnt_b_patch16", 65.41)),
        *(("tnt_pyramid_ti", 10.578529), ("tnt_pyramid_s", 32.0), ("tnt_pyramid_m", 85.0), ("tnt_pyramid_b", 157.0)),
    ],
)
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


def pico() -> TNT:
    torch.manual_seed(0)
    return vitarium.create_model("tnt_pico", num_classes=5).double().eval()


@pytest.mark.identity
def test_without_what_is_gathered_it_is_a_vit():
    model = pico()
    for part in model.blocks:
        for parameter in (part.gather.proj.weight, part.gather.norm2.weight, part.gather.norm2.bias):
            nn.init.zeros_(parameter)
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.patch_embed(image)[1]
    for part in model.blocks:
        x = part.outer(x)
    assert torch.equal(model.forward_features(image), model.norm(x))


@pytest.mark.identity
def test_words_of_a_patch_do_not_see_another_patch():
    model = pico()
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    other = image.clone()
    other[..., :4, 4:8] += 1  # the second patch
    words, changed = (model.forward_levels(x)[0] for x in (image, other))
    moved = (words - changed).abs().amax((1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [1]


@pytest.mark.identity
def test_sentences_may_change_places_with_their_positions():
    model = pico()
    words, sentences = model.patch_embed(torch.randn(1, 3, 16, 16, dtype=torch.float64))
    order = torch.randperm(16)
    both, moved = (words, sentences), (words[order], torch.cat([sentences[:, :1], sentences[:, 1:][:, order]], 1))
    for part in model.blocks:
        both, moved = part(both), part(moved)
    torch.testing.assert_close(moved[1][:, 1:], both[1][:, 1:][:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[1][:, 0], both[1][:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("options", "words"), [(dict(patch_size=16), "4 or 8, got 16"), (dict(depths=(1, 1, 1)), "one value per stage")])
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("tnt_pyramid_pico", **options)


def test_bias_of_queries_keys_and_values_as_in_timm():
    from timm.models import tnt

    options = dict(embed_dim=48, inner_dim=12, depth=2, num_heads_outer=4, num_heads_inner=2, qkv_bias=True, num_classes=5)
    theirs = tnt.TNT(img_size=64, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = vitarium.create_model(
        "tnt_s_patch16", dim=48, inner_dim=12, depth=2, num_heads=4, inner_heads=2, qkv_bias=True, image_size=64, num_classes=5
    )
    ours.double().eval().load_state_dict(from_timm(theirs.state_dict()))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["tnt_pico", "tnt_pyramid_pico"])
def test_scale_of_the_logits(name: str):
    """A scale s equals inner and outer queries that are multiplied by s sqrt(d)."""
    torch.manual_seed(0)
    one, other = (vitarium.create_model(name, num_classes=3, **options).double().eval() for options in ({}, dict(qk_scale=0.7)))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for part in one.modules():
            query = getattr(part, "qkv", None) if hasattr(part, "qkv") else getattr(part, "q", None)
            if query is not None:
                dim = query.in_features
                query.weight[:dim] *= 0.7 * (dim / part.num_heads) ** 0.5
        image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(other(image), one(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tnt_pico", "tnt_pyramid_pico"])
def test_gated_mlps(name: str, tmp_path):
    """t + t tanh(W2 relu(W1 LN(mean t))), with the authors' names; without W2 it is the plain MLP."""
    family = find_model(name)[0]
    gated, plain = (vitarium.create_model(name, num_classes=3, se=se, mlp_ratio=3.0).double().eval() for se in (True, False))
    state = gated.state_dict()
    assert {key.split("mlp.se.")[1] for key in state if ".se." in key} == {
        f"{a}.{b}" for a in ("norm", "fc1", "fc2") for b in ("weight", "bias")
    }
    mlp = next(part for part in gated.modules() if type(part).__name__ == "GatedMlp")
    x = torch.randn(2, 5, mlp.fc1.in_features, dtype=torch.float64)
    t = mlp.fc2(F.gelu(mlp.fc1(x)))
    want = t + t * torch.tanh(mlp.se.fc2(torch.relu(mlp.se.fc1(mlp.se.norm(t.mean(1, keepdim=True))))))
    torch.testing.assert_close(mlp(x), want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for key, tensor in state.items():
            if ".se.fc2." in key:
                tensor.zero_()
    plain.load_state_dict({key: tensor for key, tensor in state.items() if ".se." not in key})
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(gated(image), plain(image), rtol=1e-10, atol=1e-10)
    prefix = "blocks.0." if name == "tnt_pico" else "stages.0.blocks.0."
    theirs = {f"{prefix}se_layer.fc.{i}.weight": torch.zeros(1) for i in (0, 1, 3)}
    assert set(family.dialects["official"](theirs)) == {f"{prefix}outer.mlp.se.{part}.weight" for part in ("norm", "fc1", "fc2")}
