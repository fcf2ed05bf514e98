"""Tests specific to SpectFormer; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from tests.nn.test_mixer_pyramid import literal, softmax_attention
from vitarium.backbones.spectformer import SpectFormer, SpectFormerH, SpectralGate


def test_equals_the_authors_vanilla_model():
    def outputs(model: SpectFormer, image: Tensor) -> dict[str, Tensor]:
        return {"features": model.forward_head(model.forward_features(image), pre_logits=True), "logits": model(image)}

    assert_matches_golden("spectformer-v-xs", vitarium.create_model("spectformer_xs"), outputs)


def test_equals_the_authors_hierarchical_model():
    def outputs(model: SpectFormerH, image: Tensor) -> dict[str, Tensor]:
        features, maps = model.forward_intermediates(image)
        return {f"stage{i + 1}": m for i, m in enumerate(maps[:3])} | {"logits": model.forward_head(features)}

    assert_matches_golden("spectformer-h-s", vitarium.create_model("spectformer_h_small"), outputs)


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("tiny", 9, 0.03),
        ("xs", 20.028520, 1e-7),
        ("small", 32, 0.02),
        ("base", 57, 0.01),
        ("h_small", 21.777928, 1e-7),
        ("h_base", 32.54, 3e-4),
        ("h_large", 54.16, 3e-4),
    ],
)
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"spectformer_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def literal_gate(gate: nn.Module, x: Tensor, h: int, w: int) -> Tensor:
    """Literal spectral gate on tokens."""
    weight = torch.view_as_complex(gate.complex_weight.permute(1, 2, 0, 3).contiguous())
    spectrum = torch.fft.rfft2(x.reshape(len(x), h, w, -1), dim=(1, 2), norm="ortho") * weight
    return torch.fft.irfft2(spectrum, s=(h, w), dim=(1, 2), norm="ortho").reshape(x.shape)


def literal_vanilla(model: SpectFormer, image: Tensor) -> Tensor:
    """Literal implementation at the size that the model is made for."""
    x = model.patch_embed.proj(image)
    h, w = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2) + model.pos_embed
    for block in model.blocks:
        y = block.norm1(x)
        if hasattr(block, "filter"):
            y = literal_gate(block.filter, y, h, w)
        else:
            q, k, v = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, -1)
            x = x + F.linear(softmax_attention(q, k, v, block.attn.num_heads), block.attn.proj.weight, block.attn.proj.bias)
            y = x
        y = F.gelu(F.linear(block.norm2(y), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return model.head(model.norm(x).mean(1))


def reference(model: SpectFormer | SpectFormerH) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    return lambda image: literal_vanilla(model, image) if isinstance(model, SpectFormer) else literal(model, image, literal_gate)


def test_both_equal_their_equations():
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plain, pyramid = (vitarium.create_model(f"spectformer{name}_pico").double().eval() for name in ("", "_h"))
    torch.testing.assert_close(plain(image), reference(plain)(image), rtol=0, atol=1e-12)
    torch.testing.assert_close(pyramid(image), reference(pyramid)(image), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_gate_is_a_circular_convolution():
    gate = SpectralGate(3, (6, 8)).double()
    x = torch.randn(2, 48, 3, dtype=torch.float64)
    kernel = torch.fft.irfft2(torch.view_as_complex(gate.complex_weight), s=(6, 8))
    image = x.view(2, 6, 8, 3).permute(0, 3, 1, 2)
    convolved = sum(kernel[:, i, j, None, None] * image.roll((i, j), (2, 3)) for i in range(6) for j in range(8))
    torch.testing.assert_close(gate(x, (6, 8)), convolved.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=1e-10)


@pytest.mark.identity
@pytest.mark.parametrize("grid", [(6, 8), (5, 9), (1, 3)])
def test_a_gate_of_ones_is_the_identity_on_any_grid(grid: tuple[int, int]):
    gate = SpectralGate(3, (6, 8)).double().eval()
    nn.init.zeros_(gate.complex_weight)
    gate.complex_weight.data[..., 0] = 1
    x = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(gate(x, grid), x, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_circular_shift_passes_through_a_gate():
    gate = SpectralGate(3, (6, 8)).double()
    x = torch.randn(2, 6, 8, 3, dtype=torch.float64)
    shifted = gate(x.roll((2, 5), (1, 2)).flatten(1, 2), (6, 8))
    torch.testing.assert_close(shifted, gate(x.flatten(1, 2), (6, 8)).view_as(x).roll((2, 5), (1, 2)).flatten(1, 2), rtol=0, atol=1e-12)


def test_checkpoints_fit_another_image_size():
    for name in ("spectformer_pico", "spectformer_h_pico"):
        small, large = (vitarium.create_model(name, image_size=size) for size in (16, 32))
        for key, tensor in small.state_dict().items():
            shape = large.state_dict()[key].shape
            if tensor.shape != shape:
                assert large.resize_tensor(key, tensor, shape).shape == shape
        assert large.resize_tensor("head.weight", torch.zeros(2, 3), torch.Size([4, 3])) is None


def test_pictures_of_filters():
    gate = SpectralGate(3, (6, 8))
    with torch.no_grad():
        gate.complex_weight[:, 0, 0] = torch.tensor([30.0, 40.0])
    assert gate.picture().shape == (3, 6, 5)
    assert (gate.picture()[:, 3, 0] == 50).all()


def test_each_letter_is_a_block():
    model = vitarium.create_model("spectformer_pico", mixers="ASA")
    assert [hasattr(block, "filter") for block in model.blocks] == [False, True, False]
    pyramid = vitarium.create_model("spectformer_h_pico", mixers="AS")
    assert [isinstance(stage.blocks[0].attn, SpectralGate) for stage in pyramid.stages] == [False, True]


@pytest.mark.parametrize("mixers", ["", "SSX"])
def test_refuses(mixers: str):
    with pytest.raises(ValueError, match="one letter per block"):
        vitarium.create_model("spectformer_pico", mixers=mixers)
