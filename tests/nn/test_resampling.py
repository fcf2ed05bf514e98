"""Position tables are resampled as each system's authors do, in the table's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitarium
from vitarium.nn.positions import BILINEAR, DINO, DINOV2, PLAIN, TIMM, Resampling, fit_position_table, resize_position_table


def table(grid: tuple[int, int], prefix: int = 1, dim: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, prefix + grid[0] * grid[1], dim, generator=generator, dtype=torch.float64).to(dtype)


def cubic(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel of Keys."""
    t = distance.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def matrix(old: int, new: int, *, scale: float | None = None) -> Tensor:
    """(new, old) weights of plain bicubic resampling along one axis, from the formula: a = -0.75, edges repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    step = 1 / scale if scale else old / new
    for i in range(new):
        centre = (i + 0.5) * step - 0.5
        first = int(torch.tensor(centre).floor()) - 1
        for k in range(first, first + 4):
            weights[i, min(max(k, 0), old - 1)] += cubic(torch.tensor(centre - k, dtype=torch.float64), -0.75)
    return weights


@pytest.mark.identity
@pytest.mark.parametrize("side", [10, 9, 16, 24])  # from images of 224 to 160, 144, 256 and 384 pixels
def test_plain_bicubic_is_the_formula(side: int):
    source = table((14, 14))
    weights = matrix(14, side)
    want = torch.einsum("ij,kl,jlc->ikc", weights, weights, source[0, 1:].view(14, 14, -1)).flatten(0, 1)
    found = resize_position_table(source, (14, 14), (side, side), prefix=1)
    assert torch.equal(found[:, :1], source[:, :1])
    torch.testing.assert_close(found[0, 1:], want, rtol=0, atol=1e-12)


@pytest.mark.identity
@pytest.mark.parametrize("side", [10, 24])
def test_dino_scales_by_the_new_side_plus_a_tenth(side: int):
    source = table((14, 14))
    weights = matrix(14, side, scale=(side + 0.1) / 14)
    want = torch.einsum("ij,kl,jlc->ikc", weights, weights, source[0, 1:].view(14, 14, -1)).flatten(0, 1)
    found = resize_position_table(source, (14, 14), (side, side), prefix=1, rule=DINO)
    torch.testing.assert_close(found[0, 1:], want, rtol=0, atol=1e-12)
    close = resize_position_table(source, (14, 14), (side, side), prefix=1, rule=DINOV2)
    torch.testing.assert_close(close, found, rtol=0, atol=1e-5)
    assert not torch.equal(close, found)  # computed in float32


@pytest.mark.identity
@pytest.mark.parametrize("size", [(10, 10), (20, 17)])
def test_timms_rule_is_timms_function(size: tuple[int, int]):
    from timm.layers import resample_abs_pos_embed

    source = table((14, 14))
    want = resample_abs_pos_embed(source, list(size), [14, 14], num_prefix_tokens=1)
    assert torch.equal(resize_position_table(source, (14, 14), size, prefix=1, rule=TIMM), want)
    plain = resize_position_table(source, (14, 14), size, prefix=1)
    assert (plain - want).abs().max() > 0.1  # the two rules differ, also on larger grids


@pytest.mark.parametrize("rule", [PLAIN, BILINEAR, TIMM, DINO, Resampling("nearest"), Resampling("bilinear", align_corners=True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_tables(rule: Resampling, dtype: torch.dtype):
    found = resize_position_table(table((7, 7), dtype=dtype), (7, 7), (5, 6), prefix=1, rule=rule)
    assert found.dtype is dtype
    assert found.shape == (1, 31, 6)


def test_an_offset_that_changes_the_grid_is_refused():
    with pytest.raises(ValueError, match="in place of"):
        resize_position_table(table((7, 7), 0), (7, 7), (5, 5), rule=Resampling(offset=1.5))


def test_tables_of_no_square_grid_are_refused():
    assert fit_position_table(table((3, 4)), torch.Size((1, 26, 6)), (5, 5), prefix=1) is None


MODELS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("convit_pico", "pos_embed", 0, {}),
    ("crossvit_pico", "branches.0.pos_embed", 1, {}),
    ("dependencyvit_pico", "pos_embed", 0, {}),
    ("spectformer_pico", "pos_embed", 0, {}),
    ("t2t_vit_pico", "pos_embed", 1, {}),
    ("thorax_mae_pico", "pos_embed", 1, {}),
    ("tnt_pico", "patch_embed.outer_pos", 1, {}),
    ("vim_pico", "pos_embed", 0, dict(class_token="none")),
]


@pytest.mark.parametrize(("name", "parameter", "prefix", "arguments"), MODELS, ids=[row[0] for row in MODELS])
def test_each_system_resamples_as_its_authors(name: str, parameter: str, prefix: int, arguments: dict[str, Any]):
    """Plain bicubic to the size, for a checkpoint of another size: DeiT's code, which these systems' authors use."""
    small = vitarium.create_model(name, **arguments).double()
    size = small.default_cfg["input_size"][-1]
    large = vitarium.create_model(name, **arguments, image_size=size * 3 // 2).double()
    source, target = (model.state_dict()[parameter] for model in (small, large))
    old, new = (round((t.shape[1] - prefix) ** 0.5) for t in (source, target))
    assert old != new
    image = source[:, prefix:].view(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    want = torch.cat([source[:, :prefix], image.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(large.resize_tensor(parameter, source, target.shape), want, rtol=0, atol=1e-12)


def test_a_model_resamples_its_own_table_by_the_same_rule():
    model = vitarium.create_model("convit_pico").double().eval()
    source = model.pos_embed.detach()
    want = F.interpolate(source.view(1, 4, 4, -1).permute(0, 3, 1, 2), size=(3, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.positions((3, 6)), want.flatten(2).transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "mode"), [("swin_pico", "bicubic"), ("tinyvit_pico", "bicubic"), ("maxvit_pico", "bilinear")])
def test_bias_tables_keep_float64(name: str, mode: str):
    model = vitarium.create_model(name).double()
    parameter, tensor = next((n, p.detach()) for n, p in model.named_parameters() if n.endswith("position_bias.table"))
    heads_first = name == "tinyvit_pico"
    image = tensor if heads_first else tensor.T
    side = round(image.shape[1] ** 0.5)
    wide = F.interpolate(image.reshape(1, -1, side, side), size=(side + 2,) * 2, mode=mode, align_corners=False).flatten(2)[0]
    want = wide if heads_first else wide.T
    torch.testing.assert_close(model.resize_tensor(parameter, tensor, want.shape), want, rtol=0, atol=1e-12)
