"""Tests specific to CrossFormer; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.crossformer import CrossFormer, CrossFormerBlock, DynamicPositionBias, Groups
from vitarium.nn import WindowAttention
from vitarium.ops.windows import attention_layout


def outputs(model: CrossFormer, x: Tensor) -> dict[str, Tensor]:
    tokens = lambda maps: maps.flatten(2).transpose(1, 2)
    last, maps = model.forward_intermediates(x)
    named = {f"stage{i + 1}": tokens(m) for i, m in enumerate(maps)}
    return named | {"patch_embed": model.patch_embed(x).flatten(1, 2), "features": last.mean((2, 3)), "logits": model(x)}


@pytest.mark.parametrize("name", ["tiny", "pp_small"])
def test_equals_the_authors_model(name: str):
    assert_matches_golden(f"crossformer-{name}_224", vitarium.create_model(f"crossformer_{name}"), outputs)


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("tiny", 27.78, 1e-3),
        ("small", 30.7, 0.01),
        ("base", 52.0, 0.01),
        ("large", 92.0, 0.01),
        ("pp_small", 23.32534, 1e-6),
        ("pp_base", 52.0, 0.01),
        ("pp_large", 92.0, 0.01),
        ("pp_huge", 96.0, 0.01),
    ],
)
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"crossformer_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


@pytest.mark.parametrize(("name", "macs"), [("tiny", 2.87e9), ("pp_small", 4.45e9)])
def test_macs(name: str, macs: float):
    from vitarium.efficiency.profiler import count_macs

    assert count_macs(vitarium.create_model(f"crossformer_{name}").eval(), 224) == pytest.approx(macs, rel=0.03)


def literal_attention(block: CrossFormerBlock, x: Tensor, size: int, interval: int, around: bool = False, mask: bool = True) -> Tensor:
    """Literal implementation: pad, regroup, attend with the bias of each pair and -1e6 for padded keys, reverse, crop. (B, H, W, C)."""
    batch, height, width, dim = x.shape
    step = size * interval
    bottom, right = -height % step, -width % step
    top, left = (bottom // 2, right // 2) if around else (0, 0)
    amount = (0, 0, left, right - left, top, bottom - top)
    x = F.pad(x, amount)
    seen = F.pad(torch.zeros(1, height, width, 1, dtype=x.dtype), amount, value=-1e6 if mask else 0.0)
    rows, columns = x.shape[1] // step, x.shape[2] // step

    def group(t: Tensor) -> Tensor:
        t = t.reshape(t.shape[0], rows, size, interval, columns, size, interval, t.shape[-1])
        return t.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(t.shape[0] * rows * columns * interval**2, size * size, t.shape[-1])

    groups, hidden = group(x), group(seen)[:, None, None, :, 0]
    attn = block.attn
    q, k, v = attn.qkv(groups).view(len(groups), size * size, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    logits = q * attn.scale @ k.transpose(-1, -2) + attn.position_bias(size)
    logits = (logits.view(batch, len(hidden), *logits.shape[1:]) + hidden).view(logits.shape)
    y = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = y.view(batch, rows, columns, interval, interval, size, size, dim).permute(0, 1, 5, 3, 2, 6, 4, 7)
    return y.reshape(x.shape)[:, top : top + height, left : left + width]


def literal(model: CrossFormer, image: Tensor) -> Tensor:
    """Literal implementation of the whole model, also the reference for benchmarks."""
    x = model.patch_embed(image)
    if model.pos_embed is not None:  # of this grid
        x = x + model.pos_embed.view(1, *x.shape[1:])
    for stage in model.stages:
        x = stage.downsample(x)
        for block, side in zip(stage.blocks, stage.group_sizes, strict=True):
            whole = min(x.shape[1:3]) <= side
            size = min(x.shape[1:3]) if whole else side
            x = x + literal_attention(block, block.norm1(x), size, stage.interval if block.far and not whole else 1, **stage.padding)
            x = x + block.mlp(block.norm2(x))
            if block.ex_conv is not None:
                x = block.ex_ln(block.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return model.head(model.norm(x.permute(0, 3, 1, 2)).mean((2, 3)))


def reference(model: CrossFormer) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    return lambda image: literal(model, image)


@pytest.mark.identity
@pytest.mark.parametrize("size", [(16, 16), (35, 50), (64, 64), (96, 66)])
def test_equals_the_literal_words(size: tuple[int, int]):
    """Also for padded maps and maps smaller than a group."""
    model = vitarium.create_model("crossformer_pico", cooling=True, depths=(4, 2)).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(image), literal(model, image), rtol=0, atol=1e-11)


@pytest.mark.identity
@pytest.mark.parametrize(("pad_around", "mask_padding"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("size", [(32, 32), (35, 50)])
def test_other_paddings_equal_the_literal_words(size: tuple[int, int], pad_around: bool, mask_padding: bool):
    model = vitarium.create_model("crossformer_pico", depths=(4, 2), pad_around=pad_around, mask_padding=mask_padding).double().eval()
    usual = vitarium.create_model("crossformer_pico", depths=(4, 2)).double().eval()
    usual.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(image), literal(model, image), rtol=0, atol=1e-11)
    assert ((model(image) - usual(image)).abs().max() > 1e-6) == (size == (35, 50))  # without padding they are the same


@pytest.mark.identity
@pytest.mark.parametrize("size", [(32, 32), (35, 50)])
def test_options_equal_the_literal_words(size: tuple[int, int]):
    """Group sizes per block, ratios and kernels per stage, positions of a rectangle, no norm of patches, no biases, another scale."""
    options = dict(group_sizes=((3, 4), 2), mlp_ratio=(2.0, 3.0), merge_kernels=((2, 6),), qkv_bias=False, qk_scale=0.4)
    model = vitarium.create_model("crossformer_pico", patch_norm=False, pos_embed=True, image_size=size, **options).double().eval()
    assert [block.mlp.fc1.out_features for stage in model.stages for block in stage.blocks] == [64, 64, 192, 192]
    assert [conv.kernel_size for conv in model.stages[1].downsample.reductions] == [(2, 2), (6, 6)]
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(image), literal(model, image), rtol=0, atol=1e-11)


def test_detectors_files_and_absolute_positions_load(tmp_path):
    model = vitarium.create_model("crossformer_pico", num_classes=0, pos_embed=True)
    names = {}
    for name, tensor in model.state_dict().items():
        theirs = name.replace("pos_embed", "absolute_pos_embed").replace("stages.1.downsample", "layers.0.downsample")
        names["backbone." + theirs.replace("stages.", "layers.").replace("position_bias.", "pos.")] = tensor
    torch.save({"state_dict": names | {"neck.lateral_convs.0.conv.weight": torch.zeros(3)}}, tmp_path / "retinanet.pth")
    loaded = vitarium.create_model("crossformer_pico", num_classes=0, pos_embed=True, checkpoint=tmp_path / "retinanet.pth")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.identity
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (10, 5), (16, 24)])
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_groups_undo(size: tuple[int, int], interval: int):
    groups = Groups.of(*size, 4, interval, torch.device("cpu"))
    tokens = torch.arange(size[0] * size[1])
    assert torch.equal(groups.take[groups.back], tokens)
    if groups.inside is not None:
        assert int(groups.inside.sum()) == len(tokens)


@pytest.mark.identity
def test_far_groups_on_a_map_of_their_size_are_full_attention_among_congruent_tokens():
    part = WindowAttention(8, 2, DynamicPositionBias(32, 2)).double().eval()
    nn.init.zeros_(part.position_bias.pos3[2].weight)
    nn.init.zeros_(part.position_bias.pos3[2].bias)
    groups = Groups.of(12, 12, 4, 3, torch.device("cpu"))
    x = torch.randn(2, 144, 8, dtype=torch.float64)
    got = part(x[:, groups.take], groups)[:, groups.back]
    y, x_ = torch.arange(12).repeat_interleave(12) % 3, torch.arange(12).repeat(12) % 3
    together = (y[:, None] == y) & (x_[:, None] == x_)
    q, k, v = part.qkv(x).view(2, 144, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = part.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=together).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(groups.order, attention_layout(12, 12, 4, grid=True).order)  # MaxViT's grid


@pytest.mark.identity
def test_interval_one_is_near():
    far, near = Groups.of(9, 14, 4, 1, torch.device("cpu")), attention_layout(9, 14, 4)
    assert torch.equal(far.order, near.order)


@pytest.mark.identity
def test_the_bias_of_a_group_is_the_mlp_of_each_pair():
    part = DynamicPositionBias(64, 3).double()
    place = torch.cartesian_prod(torch.arange(5), torch.arange(5)).double()
    expected = part.of_offsets(place[:, None] - place).permute(2, 0, 1)
    torch.testing.assert_close(part(5), expected, rtol=0, atol=1e-12)
    smaller = part(3)  # includes the biases of smaller groups
    torch.testing.assert_close(smaller[:, 4, 4], expected[:, 12, 12], rtol=0, atol=1e-12)


@pytest.mark.identity
def test_padding_is_never_seen():
    """The tokens at padded places do not change the result."""
    part = WindowAttention(8, 2, DynamicPositionBias(32, 2)).double().eval()
    groups = Groups.of(6, 5, 4, 2, torch.device("cpu"))
    x = torch.randn(1, 30, 8, dtype=torch.float64)[:, groups.take]
    other = torch.where(groups.inside, x, 50 * torch.randn_like(x))
    a, b = (part(value, groups)[:, groups.back] for value in (x, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_detectors_checkpoints_load():
    from vitarium.backbones.crossformer import OFFICIAL

    state = {"backbone.layers.1.downsample.norm.weight": torch.ones(1), "backbone.layers.0.blocks.1.attn.biases": torch.ones(1)}
    assert list(OFFICIAL(state)) == ["stages.2.downsample.norm.weight"]


def test_other_groups_take_the_same_weights():
    """Group sizes and intervals of dense prediction: the position bias has no fixed size."""
    model = vitarium.create_model("crossformer_pico").eval()
    other = vitarium.create_model("crossformer_pico", group_sizes=(6, 3), intervals=(3, 2)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.isfinite(other(torch.randn(1, 3, 40, 52))).all()


def test_a_new_bias_is_seen_in_eval():
    """Cached biases follow a change of any of their parameters."""
    model = vitarium.create_model("crossformer_pico").eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = model(image)
        assert torch.equal(model(image), before)
        model.stages[0].blocks[0].attn.position_bias.pos1[2].weight.add_(3.0)
        assert not torch.equal(model(image), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depths=(1,)), "one value per stage"),
        (dict(intervals=(0, 1)), "at least 1"),
        (dict(kernels=(2, 5)), "an even number"),
        (dict(kernels=(2, 4, 6, 8, 10, 12, 14)), "divisible by 64"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("crossformer_pico", **options)
