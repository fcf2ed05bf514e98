"""Tests specific to SVT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import RESULTS, assert_matches_golden, compare, fill_state, make_input, read_golden
from tests.nn.test_mixer_pyramid import literal
from vitarium.backbones.svt import SVT, ChannelTokenScattering, Scattering
from vitarium.errors import InputError
from vitarium.ops.wavelets import FILTERS, dtcwt, inverse_dtcwt


def test_wavelets_equal_pytorch_wavelets():
    x = make_input("x", read_golden("svt-dtcwt-level1")["inputs"]["x"])
    low, real, imaginary = dtcwt(x)
    found = {"low": low, "high": torch.stack([real, imaginary], -1), "back": inverse_dtcwt(low, real, imaginary)}
    error = compare("svt-dtcwt-level1", found)
    assert error < 5e-7  # the filters were recorded in float32
    RESULTS.append(("svt-dtcwt-level1", error))


def test_channel_token_mixing_equals_the_authors():
    doc = read_golden("svt-channel-token-mixing-64")
    part = ChannelTokenScattering(64, (56, 56)).double()
    state = {k.removeprefix("m."): v for k, v in fill_state(doc["state"], doc["overrides"]).items() if "fm." not in k}
    part.load_state_dict(state)
    assert sum(p.numel() for p in part.parameters()) == doc["parameters"]
    with torch.no_grad():
        error = compare("svt-channel-token-mixing-64", {"y": part(make_input("x", doc["inputs"]["x"]), (56, 56))})
    assert error < 1e-6
    RESULTS.append(("svt-channel-token-mixing-64", error))
    with pytest.raises(InputError, match="made for 56x56 tokens, got 4x4"):
        part(torch.zeros(1, 16, 64), (4, 4))


def test_equals_the_authors_model():
    def outputs(model: SVT, image: Tensor) -> dict[str, Tensor]:
        features, maps = model.forward_intermediates(image)
        return {f"stage{i + 1}": m for i, m in enumerate(maps[:3])} | {"logits": model.forward_head(features)}

    assert_matches_golden("svt-h-s", vitarium.create_model("svt_h_small"), outputs)


@pytest.mark.parametrize(("name", "millions"), [("h_small", 21.603592), ("h_base", 32.37), ("h_large", 54.08)])
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"svt_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-4)


def along(x: Tensor, name: str, axis: int) -> Tensor:
    """Filter along an axis by a convolution with half-sample symmetric borders."""
    taps = torch.tensor(FILTERS[name], dtype=x.dtype)
    reach, size = len(taps) // 2, x.shape[axis]
    places = torch.arange(-reach, size + reach) % (2 * size)
    x = x.index_select(axis, torch.where(places < size, places, 2 * size - 1 - places))
    kernel = taps.view(1, 1, -1, 1) if axis == 2 else taps.view(1, 1, 1, -1)
    return F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), groups=x.shape[1])


def literal_scattering(part: nn.Module, tokens: Tensor, h: int, w: int) -> Tensor:
    """Literal implementation."""
    x = tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)
    lo, hi = along(x, "h0", 3), along(x, "h1", 3)
    low, lh, hl, hh = along(lo, "h0", 2), along(lo, "h1", 2), along(hi, "h0", 2), along(hi, "h1", 2)
    bands: dict[int, Tensor] = {}
    for m, (first, second) in ((lh, (15, 165)), (hh, (45, 135)), (hl, (75, 105))):
        a, b, c, d = (m[..., i::2, j::2] / 2**0.5 for i in (0, 1) for j in (0, 1))
        bands[first], bands[second] = torch.complex(a - d, b + c), torch.complex(a + d, b - c)
    high = torch.stack([bands[angle] for angle in sorted(bands)], 2)
    blocks = high.unflatten(1, (4, -1))
    as_complex = lambda weight: torch.complex(weight[0], weight[1])
    layer = lambda z, weight, bias: torch.einsum("bndohw,ndk->bnkohw", z, as_complex(weight)) + as_complex(bias)[..., None, None, None]
    z = layer(blocks, part.complex_weight_lh_1, part.complex_weight_lh_b1)
    z = layer(torch.complex(z.real.relu(), z.imag.relu()), part.complex_weight_lh_2, part.complex_weight_lh_b2).flatten(1, 2)
    quads = []
    for i, j in ((0, 5), (1, 4), (2, 3)):
        r1, i1, r2, i2 = z[:, :, i].real, z[:, :, i].imag, z[:, :, j].real, z[:, :, j].imag
        m = torch.empty_like(low)
        m[..., ::2, ::2], m[..., ::2, 1::2], m[..., 1::2, ::2], m[..., 1::2, 1::2] = r1 + r2, i1 + i2, i1 - i2, r2 - r1
        quads.append(m / 2**0.5)
    lh, hh, hl = quads
    lo = along(lh, "g1", 2) + along(low * part.complex_weight_ll, "g0", 2)
    hi = along(hh, "g1", 2) + along(hl, "g0", 2)
    return (along(hi, "g1", 3) + along(lo, "g0", 3)).flatten(2).transpose(1, 2)


def reference(model: SVT) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    return lambda image: literal(model, image, literal_scattering)


def test_equals_its_equations():
    model = vitarium.create_model("svt_pico").double().eval()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(image), reference(model)(image), rtol=0, atol=1e-12)


@pytest.mark.identity
@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (1, 1)])
def test_open_gates_change_nothing(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    part = Scattering(8, (6, 8)).double()
    nn.init.ones_(part.complex_weight_ll)
    monkeypatch.setattr(part, "mix_bands", lambda real, imaginary: (real, imaginary))
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    torch.testing.assert_close(part(x, grid), x, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    part = Scattering(8, (6, 8)).eval()
    x = torch.randn(2, 48, 8)
    half = part.to(torch.bfloat16)(x.bfloat16(), (6, 8))
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), part.float()(x.bfloat16().float(), (6, 8)), rtol=1e-2, atol=1e-2)


def test_gates_fit_another_image_size():
    small, large = (vitarium.create_model("svt_pico", image_size=size) for size in (16, 32))
    name = "stages.0.blocks.0.attn.complex_weight_ll"
    shape = large.state_dict()[name].shape
    assert shape == (32, 16, 16)
    assert large.resize_tensor(name, small.state_dict()[name], shape).shape == shape
    assert large.resize_tensor("head.weight", torch.zeros(2, 3), torch.Size([4, 3])) is None


def test_refuses_channels_that_blocks_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        Scattering(6, (4, 4))


def test_the_letter_t_is_the_scattering_of_channels_and_tokens():
    model = vitarium.create_model("svt_pico", mixers="TA", num_classes=3).eval()
    assert type(model.stages[0].blocks[0].attn).__name__ == "ChannelTokenScattering"
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(vitarium.errors.InputError, match="is made for 8x8 tokens"):
        model(torch.randn(2, 3, 32, 32))


def test_epsilon_and_the_ratio_of_the_class_attention():
    """The epsilon is that of every norm but those after strided convolutions; the class attention has the last stage's ratio."""
    model = vitarium.create_model("svt_pico", norm_eps=1e-3, mlp_ratios=(4, 2))
    found = {
        name.split(".")[-2 if "downsample" in name else -1]: part.eps
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.LayerNorm)
    }
    assert found == {"downsample": 1e-5, "norm1": 1e-3, "norm2": 1e-3, "norm": 1e-3, "head_norm": 1e-3}
    assert model.class_reader.mlp.fc1.out_features == 2 * 64
