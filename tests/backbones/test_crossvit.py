"""Tests specific to CrossViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.crossvit import ClassAttention, CrossViT, official
from vitarium.nn import Attention


def outputs(model: CrossViT, x: Tensor) -> dict[str, Tensor]:
    small, large = model.forward_branches(x)
    return {"cls0": small[:, 0], "cls1": large[:, 0], "logits": model(x)}


@pytest.mark.parametrize(("golden", "name"), [("crossvit-tiny_240", "tiny"), ("crossvit-9_dagger_240", "9_dagger")])
def test_equals_the_authors_model(golden: str, name: str):
    assert_matches_golden(golden, vitarium.create_model(f"crossvit_{name}"), outputs, merged=1000)  # one bias for two heads


def test_deep_fusions_and_fixed_sizes_equal_the_authors_model():
    model = CrossViT(
        **dict(dims=(64, 96), depths=((1, 2, 1), (2, 1, 2)), num_heads=(2, 3), mlp_ratios=(2, 3), num_classes=14),
        **dict(image_size=120, large_size=112, fixed_sizes=True, multi_conv=True, qkv_bias=False),
    )
    assert_matches_golden("crossvit-fuse_128", model, outputs, merged=14)


@pytest.mark.parametrize("size", [(240, 240), (224, 224), (224, 480)])
def test_fixed_sizes_equal_timms_model(size: tuple[int, int]):
    import timm

    arguments = dict(num_heads=[2, 2], depth=[[1, 2, 0], [1, 1, 0]], num_classes=5)
    theirs = timm.create_model("crossvit_9_240", embed_dim=[24, 32], **arguments).eval()
    ours = CrossViT(
        **dict(dims=(24, 32), num_heads=(2, 2), depths=((1, 2), (1, 1)), mlp_ratios=(3, 3), num_classes=5, fixed_sizes=True)
    ).eval()
    ours.load_state_dict(official(theirs.state_dict()))
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *(("tiny", 7.0148), ("small", 26.86), ("base", 105.03), ("9", 8.55), ("9_dagger", 8.776592), ("15", 27.53)),
        *(("15_dagger", 28.21), ("15_dagger_384", 28.5), ("18", 43.27), ("18_dagger", 44.27), ("18_dagger_384", 44.61)),
    ],
)
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"crossvit_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_equals_timms_model():
    import timm

    theirs = timm.create_model("crossvit_9_dagger_240", num_classes=5).eval()
    ours = vitarium.create_model("crossvit_9_dagger", num_classes=5).eval()
    ours.load_state_dict(official(theirs.state_dict()))
    image = torch.randn(1, 3, 240, 240)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


def pico() -> CrossViT:
    torch.manual_seed(0)
    return vitarium.create_model("crossvit_pico", num_classes=5).double().eval()


@pytest.mark.identity
def test_class_attention_is_the_first_row_of_full_attention():
    part, plain = ClassAttention(12, 3).double(), Attention(12, 3).double()
    linears = (part.wq, part.wk, part.wv)
    plain.qkv.weight.data = torch.cat([linear.weight for linear in linears]).detach()
    plain.qkv.bias.data = torch.cat([linear.bias for linear in linears]).detach()
    plain.proj.load_state_dict(part.proj.state_dict())
    z = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(part(z), plain(z)[:, :1], rtol=0, atol=1e-12)


@pytest.mark.identity
def test_fusion_changes_class_tokens_alone():
    encoder = pico().stages[0]
    both = torch.randn(2, 65, 32, dtype=torch.float64), torch.randn(2, 17, 48, dtype=torch.float64)
    run = lambda blocks, x: torch.nn.Sequential(*blocks)(x)
    fused = encoder(both, run)
    encoder.fuse = False
    apart = encoder(both, run)
    for a, b in zip(fused, apart, strict=True):
        assert torch.equal(a[:, 1:], b[:, 1:])
        assert (a[:, 0] - b[:, 0]).abs().max() > 1e-3


@pytest.mark.identity
def test_one_head_on_both_class_tokens_is_the_mean_of_two_heads():
    heads = {f"head.{i}.{kind}": torch.randn(*shape) for i, d in ((0, 3), (1, 4)) for kind, shape in (("weight", (5, d)), ("bias", (5,)))}
    one = official(dict(heads))
    c0, c1 = torch.randn(2, 3), torch.randn(2, 4)
    two = [c @ heads[f"head.{i}.weight"].T + heads[f"head.{i}.bias"] for i, c in enumerate((c0, c1))]
    torch.testing.assert_close(torch.cat([c0, c1], 1) @ one["head.weight"].T + one["head.bias"], (two[0] + two[1]) / 2)


def test_sizes_of_both_branches():
    with torch.device("meta"):
        model = vitarium.create_model("crossvit_tiny")
        large = vitarium.create_model("crossvit_18_dagger_384")
    assert model.grids(240, 240) == ((20, 20), (14, 14))
    assert model.grids(224, 480) == ((19, 40), (13, 28))
    assert model.grids(1, 1) == ((1, 1), (1, 1))
    assert large.grids(408, 408) == ((34, 34), (24, 24))


def test_without_fusion_it_is_two_vits():
    model = vitarium.create_model("crossvit_pico", fuse=False)
    assert not any("fusion" in name for name, _ in model.named_parameters())
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dims=(32,)), "one per branch"),
        (dict(image_size=15), "divisible by its patch size 2, got 15; try 14"),
        (dict(multi_conv=True), "12 or 16"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("crossvit_pico", **options)
