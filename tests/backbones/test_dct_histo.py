"""Tests specific to the DCT-HistoTransformer; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import RESULTS, compare, make_input, read_golden
from vitarium.backbones.dct_histo import DCTAttention2d, DCTHistoTransformer, DCTLowPass, MobileConv
from vitarium.ops.spectral import dct2, dct_matrix, idct2


def test_transform_equals_scipys():
    x = make_input("x", read_golden("dct_histo-dct2_lowpass")["inputs"]["x"])
    error = compare("dct_histo-dct2_lowpass", {"dct": dct2(x), "kept": dct2(x, (14, 14)), "lowpass": DCTLowPass(14)(x)})
    assert error < 1e-10
    RESULTS.append(("dct_histo-dct2_lowpass", error))


def test_parameter_count():
    with torch.device("meta"):
        model = vitarium.create_model("dct_histo_base")
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 3.5e6


@pytest.mark.identity
@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 3)])
def test_nothing_is_lost_and_energy_stays(size: tuple[int, int]):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(idct2(dct2(x)), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(dct2(x).square().sum(), x.square().sum())
    torch.testing.assert_close(DCTLowPass(12)(x), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(DCTLowPass(12).energy_share(x), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.identity
def test_a_constant_keeps_only_its_first_coefficient():
    coefficients = dct2(torch.full((6, 9), 2.0, dtype=torch.float64))
    assert coefficients[0, 0].item() == pytest.approx(54**0.5 * 2)
    coefficients[0, 0] = 0
    assert coefficients.abs().max() < 1e-12


@pytest.mark.identity
def test_a_low_pass_is_the_nearest_map_of_the_kept_cosines():
    x = torch.randn(7, 9, dtype=torch.float64)
    basis = torch.einsum("uh,vw->hwuv", dct_matrix(7, 3, x), dct_matrix(9, 3, x)).reshape(63, 9)
    nearest = basis @ torch.linalg.lstsq(basis, x.reshape(63, 1)).solution
    torch.testing.assert_close(DCTLowPass(3)(x[None, None])[0, 0], nearest.view(7, 9), rtol=0, atol=1e-12)


def test_refuses_more_coefficients_than_samples():
    with pytest.raises(ValueError, match="4x5 has 4x5 coefficients, not 5x5"):
        dct2(torch.randn(4, 5), (5, 5))


def literal_attention(part: DCTAttention2d, x: Tensor) -> Tensor:
    """Literal implementation, with the full transform and zeros."""
    batch, channels, height, width = x.shape
    rows, columns = min(part.keep, height), min(part.keep, width)
    down, right = dct_matrix(height, height, x), dct_matrix(width, width, x)
    z = (down @ x @ right.T)[:, :, :rows, :columns] / (height * width) ** 0.5
    z = z.flatten(2).transpose(1, 2) + part.pos[:rows, :columns].reshape(-1, channels)
    heads = part.attn.num_heads
    q, k, v = part.attn.qkv(part.norm1(z)).reshape(batch, -1, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-2, -1) * (channels // heads) ** -0.5).softmax(-1) @ v
    z = z + part.attn.proj(mixed.transpose(1, 2).reshape(batch, -1, channels))
    z = z + part.mlp.fc2(F.gelu(part.mlp.fc1(part.norm2(z))))
    whole = torch.zeros_like(x)
    whole[:, :, :rows, :columns] = z.transpose(1, 2).reshape(batch, channels, rows, columns)
    return down.T @ whole @ right * (height * width) ** 0.5


def literal_conv(part: MobileConv, x: Tensor) -> Tensor:
    y = F.silu(part.norm1(part.expand(x)))
    y = F.silu(part.norm2(part.dwconv(y)))
    y = y * torch.sigmoid(part.se.fc2(F.silu(part.se.fc1(y.mean((2, 3), keepdim=True)))))
    y = part.norm3(part.project(y))
    return x + y if part.residual else y


def literal(model: DCTHistoTransformer, image: Tensor) -> Tensor:
    x = F.silu(model.stem.bn(model.stem.conv(image)))
    for stage in model.stages:
        x = literal_conv(stage.downsample, x)
        for block in stage.blocks:
            both = torch.cat([literal_attention(block.dct, x), literal_conv(block.conv, x)], 1)
            x = x + block.fuse.bn(block.fuse.conv(both))
    return model.head(model.head_norm(x.mean((2, 3))))


def reference(model: DCTHistoTransformer) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    return lambda image: literal(model, image)


def test_equals_its_equations_and_folded_norms_change_nothing():
    model = vitarium.create_model("dct_histo_pico").double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    for size in ((16, 16), (33, 20), (9, 5)):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(model(image), reference(model)(image), rtol=0, atol=1e-11)
    expected = model(image)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.fuse().modules())
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-11)


@pytest.mark.identity
def test_half_the_frequencies_are_a_quarter_of_the_tokens():
    counts = []
    for attention in ("dct", "spatial"):
        model = vitarium.create_model("dct_histo_pico", attention=attention).eval()
        model.stages[0].blocks[0].dct.attn.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
        model(torch.randn(1, 3, 16, 16))
    assert counts == [16, 64]


def test_high_frequencies_do_not_pass_the_attention():
    part = DCTAttention2d(16, 3).double().eval()
    with torch.no_grad():
        coefficients = dct2(part(torch.randn(2, 16, 8, 9, dtype=torch.float64)))
    assert coefficients[:, :, 3:].abs().max() < 1e-12
    assert coefficients[..., 3:].abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(keeps=(4,)), "one value per stage"), (dict(dims=(24, 48)), "multiples of 16"), (dict(attention="soft"), "dct, spatial, none")],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("dct_histo_pico", **options)
