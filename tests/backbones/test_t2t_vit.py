"""Tests specific to T2T-ViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.t2t_vit import PerformerLayer, SoftSplit, T2TTokenizer, T2TViT, TransformerLayer, official, sine_table


def outputs(model: T2TViT, x: Tensor) -> dict[str, Tensor]:
    features = model.forward_features(x)
    return {"tokens": model.patch_embed(x).flatten(2).transpose(1, 2), "cls": features[:, 0], "logits": model(x)}


def as_golden(name: str, **options) -> None:
    model = vitarium.create_model(name, qk_scale="head", **options)
    fixed = sum(buffer.numel() for buffer in model.buffers())  # the authors count their fixed tensors as parameters
    assert_matches_golden(
        options.pop("golden", None) or GOLDENS[name], model, outputs, {"pos_embed": model.pos_embed.double()}, merged=fixed
    )


GOLDENS = {"t2t_vit_7": "t2t_vit-7_224", "t2t_vit_t_14": "t2t_vit-t_96"}


def test_equals_the_authors_performer():
    as_golden("t2t_vit_7")


def test_equals_the_authors_transformer():
    as_golden("t2t_vit_t_14", embed_dim=128, depth=2, num_heads=4, mlp_ratio=2, image_size=96, num_classes=10)


def test_biases_and_a_scale_equal_the_authors_transformer():
    sizes = dict(embed_dim=96, depth=3, num_heads=3, mlp_ratio=3, token_dim=48, image_size=112, num_classes=15)
    model = vitarium.create_model("t2t_vit_t_14", qkv_bias=True, qk_scale=96**-0.5, **sizes)
    assert_matches_golden("t2t_vit-t_112", model, outputs, {"pos_embed": model.pos_embed.double()}, merged=model.pos_embed.numel())


def literal(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """Literal implementation of the performer model from a state dict, also the reference for benchmarks."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x)))

    for number, (kernel, stride, padding) in enumerate(((7, 4, 2), (3, 2, 1))):
        layer = f"patch_embed.layers.{number}"
        rows = (x.shape[-1] + 2 * padding - kernel) // stride + 1
        tokens = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
        k, q, v = linear(f"{layer}.kqv", norm(f"{layer}.norm1", tokens)).split(64, -1)
        w = state[f"{layer}.w"]
        qp, kp = (
            torch.exp(torch.einsum("bti,mi->btm", u, w) - (u * u).sum(-1, keepdim=True).repeat(1, 1, 32) / 2) / 32**0.5 for u in (q, k)
        )
        d = torch.einsum("bti,bi->bt", qp, kp.sum(1)).unsqueeze(2)
        kptv = torch.einsum("bin,bim->bnm", v, kp)
        z = v + linear(f"{layer}.proj", torch.einsum("bti,bni->btn", qp, kptv) / (d.repeat(1, 1, 64) + 1e-8))
        z = z + mlp(f"{layer}.mlp", norm(f"{layer}.norm2", z))
        x = z.transpose(1, 2).reshape(x.shape[0], 64, rows, rows)
    tokens = linear("patch_embed.project", F.unfold(x, 3, padding=1, stride=2).transpose(1, 2))
    x = torch.cat([state["cls_token"].expand(len(tokens), -1, -1), tokens], 1) + state["pos_embed"]
    dim = x.shape[-1]
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * dim**-0.5).softmax(-1)
        x = x + linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).reshape(x.shape))
        x = x + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", x))
    return linear("head", norm("norm", x)[:, 0])


def reference(model: T2TViT) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    return lambda image: literal(model.state_dict(), image, model.blocks[0].attn.num_heads)


def test_equals_the_equations_written_out():
    model = vitarium.create_model("t2t_vit_7", image_size=64, depth=2, num_classes=7).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), reference(model)(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("7", 4.2557),
        ("10", 5.83),
        ("12", 6.88),
        ("14", 21.47),
        ("19", 39.08),
        ("24", 64.0),
        ("t_14", 21.47),
        ("t_19", 39.08),
        ("t_24", 64.0),
        ("14_resnext", 21.47),
        ("14_wide", 25.0),
    ],
)
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"t2t_vit_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=3e-3)


@pytest.mark.identity
def test_soft_split_is_torchs_unfold_and_linear():
    split = SoftSplit(3, 7, 4)
    x, y = torch.randn(2, 2, 3, 33, 22, dtype=torch.float64)
    assert torch.equal(split(x), F.unfold(x, 7, padding=2, stride=4).transpose(1, 2))
    torch.testing.assert_close(split(2 * x + y), 2 * split(x) + split(y))


@pytest.mark.identity
def test_the_last_split_and_its_linear_layer_are_one_convolution():
    tokenizer = T2TTokenizer(((3, 2), (3, 2)), "transformer", 8, 3, 12).double()
    *_, before, after = tokenizer.maps(torch.randn(2, 3, 18, 13, dtype=torch.float64))
    weight = tokenizer.project.weight.flatten(1)
    expected = F.linear(F.unfold(before, 3, padding=1, stride=2).transpose(1, 2), weight, tokenizer.project.bias)
    torch.testing.assert_close(after.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-12)
    state = {f"tokens_to_token.attention1.attn.{k}": v for k, v in tokenizer.layers[0].state_dict().items()}
    assert torch.equal(official(state | {"tokens_to_token.project.weight": weight})["patch_embed.project.weight"], tokenizer.project.weight)


@pytest.mark.identity
def test_random_features_approach_softmax_attention_as_they_grow_in_number():
    """The error decreases as m^-1/2: from 32 to 8192 features by a factor of 16, within a factor of 2."""
    torch.manual_seed(0)
    q, k, v = 0.15 * torch.randn(3, 8, 40, 16, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    errors = []
    for m in (32, 512, 8192):
        part = PerformerLayer(16, 16, m).double()
        part.w.normal_()
        errors.append((part.attend(q, k, v, eps=0.0) - exact).square().mean().sqrt().item())
    assert 2 < errors[0] / errors[1] < 8
    assert 2 < errors[1] / errors[2] < 8


@pytest.mark.identity
def test_random_features_are_orthogonal_and_fixed():
    part = PerformerLayer(12, 16)
    torch.testing.assert_close(part.w @ part.w.T, 8 * torch.eye(8), rtol=0, atol=1e-5)
    assert "w" in part.state_dict()
    assert not part.w.requires_grad


@pytest.mark.identity
def test_the_skip_starts_at_the_values():
    part = TransformerLayer(10, 8).double()
    for linear in (part.proj, part.mlp.fc2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(part(x), F.linear(part.norm1(x), part.qkv.weight[16:]), rtol=0, atol=1e-12)


def test_position_table():
    table = sine_table(6, 5)[0]
    assert torch.equal(table[0], torch.tensor([0.0, 1, 0, 1, 0, 1]))
    expected = [f(torch.tensor(3 / 10000 ** (2 * (j // 2) / 6), dtype=torch.float64)) for j, f in enumerate((torch.sin, torch.cos) * 3)]
    torch.testing.assert_close(table[3], torch.stack(expected).float())


def test_maps_of_the_tokenizer_and_sizes():
    model = vitarium.create_model("t2t_vit_7", depth=1)
    with torch.inference_mode():
        shapes = [tuple(m.shape) for m in model.patch_embed.maps(torch.zeros(1, 3, 224, 160))]
    assert shapes == [(1, 64, 56, 40), (1, 64, 28, 20), (1, 256, 14, 10)]
    assert model.min_size == 3
    assert model.patch_embed.grid(224, 161) == (14, 10)


def test_one_split_cuts_patches():
    model = vitarium.create_model("t2t_vit_pico", splits=((4, 4),))
    assert len(model.patch_embed.layers) == 0
    assert (model.patch_embed.project.kernel_size, model.patch_embed.project.padding) == ((4, 4), (0, 0))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(layer="linear"), "performer, transformer"),
        (dict(splits=((2, 3),)), "kernel >= stride"),
        (dict(qk_scale="both"), "'head' or 'width'"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("t2t_vit_pico", **options)
