"""Tests specific to TransNeXt; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import RESULTS, assert_matches_golden, compare
from vitarium.backbones.transnext import (
    AggregatedAttention,
    DistancePositionBias,
    FullAttention,
    TransNeXt,
    inside_counts,
    outside,
)


def outputs(model: TransNeXt, x: Tensor) -> dict[str, Tensor]:
    _, maps = model.forward_intermediates(x)
    return {f"stage{i + 1}": m.flatten(2).transpose(1, 2) for i, m in enumerate(maps)} | {"logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("transnext-micro_224", vitarium.create_model("transnext_micro"), outputs)


def test_other_windows_heads_and_pools_equal_the_authors_model():
    model = TransNeXt(
        **dict(dims=(32, 48, 64, 96), depths=(1, 2, 2, 1), mlp_ratios=(4, 4, 3, 3), pool_ratios=(8, 4, 2, 2), num_classes=10),
        **dict(num_heads=(2, 3, 4, 6), window_size=(5, 3, 3, 3), fixed_pool_size=4, pretrain_size=128),
    )
    assert_matches_golden("transnext-pool4_160", model, outputs)


@pytest.mark.parametrize(
    ("golden", "size", "pooled", "window"),
    [("transnext-cpb_coords", (14, 14), (7, 7), 3), ("transnext-cpb_coords_rect", (20, 12), (5, 4), 5)],
)
def test_equals_the_authors_coordinates(golden: str, size: tuple[int, int], pooled: tuple[int, int], window: int):
    inputs, kind = DistancePositionBias(1, 14).coordinates(size, pooled)
    length, mask = inside_counts(*size, window_size=window), outside(*size, window_size=window)
    error = compare(golden, {"coords": inputs[kind], "local_length": length[:, None], "mask": mask})
    assert error < 1e-6
    RESULTS.append((golden, error))


@pytest.mark.identity
@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_interpolated_biases_are_bilinear_in_each_axis_of_queries_and_keys(size: tuple[int, int]):
    model = vitarium.create_model("transnext_pico", bias_size=16, pretrain_size=16).double().eval()
    part = model.stages[0].blocks[0].attn  # maps of 8 x 8 and keys of 2 x 2 at 16 pixels
    grid = (size[0] // 2, size[1] // 2)
    pooled = (grid[0] // 4, grid[1] // 4)
    table = part.position_bias((8, 8), (2, 2)).reshape(part.num_heads, 8, 8, 2, 2)
    sides = zip((8, 8, 2, 2), (*grid, *pooled), strict=True)
    steps = [F.interpolate(torch.eye(old, dtype=torch.float64)[None], new, mode="linear")[0] for old, new in sides]
    expected = torch.einsum("habcd,ai,bj,cp,dq->hijpq", table, *steps).reshape(part.num_heads, math.prod(grid), math.prod(pooled))
    torch.testing.assert_close(part.bias(grid, pooled, torch.float64), expected, rtol=0, atol=1e-12)
    if size == (16, 16):
        plain = vitarium.create_model("transnext_pico", pretrain_size=16).double().eval()
        plain.load_state_dict(model.state_dict())
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(model(image), plain(image), rtol=0, atol=1e-12)


def test_segmenters_files_load(tmp_path):
    model = vitarium.create_model("transnext_pico", num_classes=0)
    names = {}
    for name, tensor in model.state_dict().items():
        found = re.match(r"stages\.(\d)\.(downsample|blocks|norm)\.(.*)", name)
        part = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[found[2]]
        theirs = found[3].replace("position_bias.", "").replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        names[f"backbone.{part}{int(found[1]) + 1}.{theirs}"] = tensor
    torch.save({"state_dict": names | {"decode_head.conv_seg.bias": torch.zeros(150)}}, tmp_path / "upernet.pth")
    loaded = vitarium.create_model("transnext_pico", num_classes=0, bias_size=16, checkpoint=tmp_path / "upernet.pth")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_biases_of_the_projections_are_optional():
    model = vitarium.create_model("transnext_pico", qkv_bias=False)
    names = {name for name, _ in model.named_parameters()}
    assert not {name for name in names if name.endswith((".q.bias", ".kv.bias", ".qkv.bias"))}
    assert {name for name in names if name.endswith((".proj.bias", ".sr.bias"))}


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("micro", 12.809304, 1e-6),
        ("tiny", 28.2, 0.005),
        ("small", 49.7, 0.005),
        ("base", 89.7, 0.005),
        ("base_384", 89.7, 0.005),
        ("micro_aaaa", 13.1, 0.005),
    ],
)
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"transnext_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def literal(part: AggregatedAttention, x: Tensor) -> Tensor:
    """Literal attention with unfolded neighbourhoods and the bias of every pair, also the reference for benchmarks. (B, H, W, C)."""
    batch, height, width, dim = x.shape
    heads, d, n = part.num_heads, dim // part.num_heads, height * width
    tokens = x.reshape(batch, n, dim)
    rows, columns = part.pooled_grid(height, width)
    split = lambda t: t.reshape(batch, -1, heads, d).transpose(1, 2)
    unit = F.normalize(split(part.q(tokens)), dim=-1)
    valid = F.unfold(x.new_ones(1, 1, height, width), 3, padding=1)[0].T  # (N, 9)
    scale = (valid.sum(1) + rows * columns).log()[:, None]
    q = (unit + part.query_embedding) * F.softplus(part.temperature) * scale
    k, v = part.kv(tokens).chunk(2, -1)
    k = F.normalize(split(k), dim=-1).transpose(1, 2).reshape(batch, n, dim)
    unfold = lambda t: (
        F.unfold(t.transpose(1, 2).reshape(batch, dim, height, width), 3, padding=1).view(batch, heads, d, 9, n).permute(0, 1, 4, 2, 3)
    )
    local = (q[..., None, :] @ unfold(k))[..., 0, :] + part.relative_pos_bias_local[:, None]
    local = local.masked_fill(valid == 0, -math.inf)
    coarse = F.adaptive_avg_pool2d(F.gelu(part.sr(x.permute(0, 3, 1, 2))), (rows, columns)).flatten(2).transpose(1, 2)
    k_pool, v_pool = part.kv(part.norm(coarse)).chunk(2, -1)
    pooled = q @ F.normalize(split(k_pool), dim=-1).transpose(-1, -2) + part.position_bias((height, width), (rows, columns))
    near, far = torch.cat([local, pooled], -1).softmax(-1).split([9, rows * columns], -1)
    near = near + unit @ part.learnable_tokens + part.learnable_bias
    y = (unfold(v) @ near[..., None])[..., 0] + far @ split(v_pool)
    return part.proj(y.transpose(1, 2).reshape(batch, height, width, dim))


def reference(model: TransNeXt) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same model with aggregated attention by the equations above."""
    for part in model.modules():
        if isinstance(part, AggregatedAttention):
            part.forward = functools.partial(literal, part)
    return model


def aggregated(pool_ratio: int = 2, fixed: int | None = None) -> AggregatedAttention:
    part = AggregatedAttention(48, 2, 8, pool_ratio, fixed).double().eval()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    return part


@pytest.mark.identity
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 5), (1, 1), (16, 6)])
def test_equals_the_literal_words(size: tuple[int, int]):
    part = aggregated()
    x = torch.randn(2, *size, 48, dtype=torch.float64)
    torch.testing.assert_close(part(x), literal(part, x), rtol=0, atol=1e-5)  # logarithms in float32


@pytest.mark.identity
@pytest.mark.parametrize(("size", "pooled"), [((8, 8), (4, 4)), ((7, 9), (3, 4)), ((5, 3), (7, 7))])
def test_biases_are_the_mlp_of_each_pair(size: tuple[int, int], pooled: tuple[int, int]):
    """Also if the cells of the pooled grid differ in size, and if it is finer than the map."""
    part = DistancePositionBias(3, 8).double()
    places = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in size), indexing="ij"))
    middles = F.adaptive_avg_pool2d(places[None], pooled)[0]
    apart = (places.flatten(1).T[:, None] - middles.flatten(1).T) / 7 * 8
    inputs = apart.sign() * (apart.abs() + 1).log2() / math.log2(8)
    expected = part.cpb_fc2(F.relu(part.cpb_fc1(inputs))).permute(2, 0, 1)
    torch.testing.assert_close(part(size, pooled), expected, rtol=0, atol=1e-6)


@pytest.mark.identity
def test_how_many_keys_a_token_sees():
    counts = inside_counts(5, 4).view(5, 4)
    assert counts[0, 0] == 4
    assert counts[0, 1] == 6
    assert counts[2, 2] == 9
    assert torch.equal(counts.flatten(), 9 - outside(5, 4).sum(1).float())


@pytest.mark.identity
def test_the_fresh_temperature():
    part = FullAttention(48, 2, 8)
    torch.testing.assert_close(F.softplus(part.temperature), torch.full((2, 1, 1), 1 / 0.24))


@pytest.mark.identity
def test_without_learned_keys_weights_sum_to_one():
    """Constant values are unchanged."""
    part = aggregated()
    nn.init.zeros_(part.learnable_tokens)
    nn.init.zeros_(part.learnable_bias)
    nn.init.zeros_(part.kv.weight[48:])
    nn.init.constant_(part.kv.bias[48:], 2.0)
    part.proj = nn.Identity()
    out = part(torch.randn(1, 6, 7, 48, dtype=torch.float64))
    torch.testing.assert_close(out, torch.full_like(out, 2.0), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_fixed_grid_of_the_same_size_changes_nothing():
    part, fixed = aggregated(), aggregated(fixed=4)
    fixed.load_state_dict(part.state_dict())
    x = torch.randn(1, 8, 8, 48, dtype=torch.float64)
    assert torch.equal(part(x), fixed(x))
    assert fixed(torch.randn(1, 12, 20, 48, dtype=torch.float64)).shape == (1, 12, 20, 48)


@pytest.mark.identity
def test_where_the_neighbourhood_is_the_map_local_attention_is_full_attention():
    """On a 2 x 2 map, without position bias and learned keys."""
    full = FullAttention(48, 2, 8).double()
    part = AggregatedAttention(48, 2, 8, 2, None, ("local",)).double()
    for parameter in (
        part.learnable_tokens,
        part.relative_pos_bias_local,
        full.position_bias.cpb_fc2.weight,
        full.position_bias.cpb_fc2.bias,
    ):
        nn.init.zeros_(parameter)
    full.qkv.weight.data = torch.cat([part.q.weight, part.kv.weight]).detach()
    full.qkv.bias.data = torch.cat([part.q.bias, part.kv.bias]).detach()
    for name in ("query_embedding", "temperature"):
        getattr(full, name).data = getattr(part, name).detach()
    full.proj.load_state_dict(part.proj.state_dict())
    x = torch.randn(2, 2, 2, 48, dtype=torch.float64)
    torch.testing.assert_close(part(x), full(x), rtol=0, atol=1e-12)


def test_one_path_alone_and_a_plain_mlp():
    for options in (dict(paths=("local",)), dict(paths=("pooled",)), dict(conv_glu=False), dict(fixed_pool_size=2)):
        model = vitarium.create_model("transnext_pico", **options).eval()
        assert torch.isfinite(model(torch.randn(1, 3, 16, 20))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depths=(1,)), "one value per stage"),
        (dict(dims=(24, 40)), "multiples of 24"),
        (dict(paths=("near",)), "among local, pooled"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("transnext_pico", **options)
