"""Tests specific to MaxViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.maxvit import Conv2dSame, MaxViT, PartitionAttention, official
from vitarium.nn import WindowAttention
from vitarium.ops.windows import attention_layout


def outputs(model: MaxViT, x: Tensor) -> dict[str, Tensor]:
    _, maps = model.forward_intermediates(x)
    return {"stem": model.stem(x)} | {f"stage{i + 1}": m for i, m in enumerate(maps)} | {"logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("maxvit-tiny_224", vitarium.create_model("maxvit_tiny"), outputs)


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [("tiny", 30.916528, 1e-6), ("small", 69, 0.01), ("base", 119.5, 0.01), ("large", 212, 0.01), ("xlarge", 475, 0.01)],
)
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"maxvit_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


@pytest.mark.identity
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (4, 4), (1, 3)])
def test_layouts_are_permutations_that_undo(grid: bool, size: tuple[int, int]):
    layout = attention_layout(*size, 4, grid=grid)
    places = torch.arange(layout.order.numel())
    assert torch.equal(layout.order[layout.inverse], places)
    assert torch.equal(layout.inverse[layout.order], places)
    if layout.region is not None:  # no window is all padding
        assert (layout.region == 0).any(1).all()
        assert int((layout.region == 0).sum()) == size[0] * size[1]


@pytest.mark.identity
def test_grid_attention_is_full_attention_among_tokens_a_grid_step_apart():
    part = WindowAttention(8, 2, 4).double().eval()
    nn.init.zeros_(part.position_bias.table)
    height, width, group = 8, 12, (2, 3)
    layout = attention_layout(height, width, 4, grid=True)
    x = torch.randn(2, height * width, 8, dtype=torch.float64)
    got = part(x[:, layout.order], layout)[:, layout.inverse]
    y, x_ = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    together = (y[:, None] % group[0] == y % group[0]) & (x_[:, None] % group[1] == x_ % group[1])
    q, k, v = part.qkv(x).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = part.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=together).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_where_a_window_covers_the_map_both_partitions_are_one():
    part = PartitionAttention(32, 4, 0.0).double().eval()
    nn.init.normal_(part.attn.position_bias.table)
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    window, grid = (attention_layout(4, 4, 4, grid=grid) for grid in (False, True))
    assert torch.equal(window.order, grid.order)
    assert torch.equal(part(x, window), part(x, grid))


@pytest.mark.identity
def test_padding_is_never_seen():
    """A 6 x 5 map in windows of 4: padding does not change the result."""
    part = PartitionAttention(32, 4, 0.0).double().eval()
    for grid in (False, True):
        layout = attention_layout(6, 5, 4, grid=grid)
        x = torch.randn(1, 64, 32, dtype=torch.float64)
        other = torch.where(layout.inside, x, 50 * torch.randn_like(x))
        assert not torch.equal(x, other)
        a, b = (part(value, layout)[:, layout.inside.flatten()] for value in (x, other))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.identity
def test_folded_norms_change_nothing():
    model = vitarium.create_model("maxvit_pico").double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    image = torch.randn(2, 3, 33, 20, dtype=torch.float64)
    expected = model.eval()(image)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.fuse().modules())
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-11)


def test_equals_timms_model_on_another_window():
    """A checkpoint with windows of 7 loads into windows of 2."""
    import timm

    theirs = timm.create_model("maxvit_tiny_tf_224", img_size=64, depths=(1, 1, 1, 1), num_classes=5).eval()
    ours = vitarium.create_model("maxvit_tiny", window_size=2, depths=(1, 1, 1, 1), num_classes=5).eval()
    from vitarium.backbones.maxvit import official

    for name, parameter in theirs.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    ours.load_state_dict(official(theirs.state_dict()))
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depths=(1,)), "one value per stage"),
        (dict(dims=(24, 48)), "multiples of 32"),
        (dict(partitions=("grid",)), "two of window, grid"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("maxvit_pico", **options)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (6, 7), (1, 2)])
def test_same_padding_is_tensorflows(size: tuple[int, int], stride: int):
    conv, x = Conv2dSame(4, 4, 3, stride, groups=4), torch.randn(1, 4, *size)
    needed = [max((-(-side // stride) - 1) * stride + 3 - side, 0) for side in size]  # the smaller half goes before
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in needed)
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), conv.weight, conv.bias, stride, groups=4)
    assert expected.shape[2:] == tuple(-(-side // stride) for side in size)
    torch.testing.assert_close(conv(x), expected)


def test_options_equal_timms():
    """Windows and grids of different sides, other heads and ratios, no squeeze-and-excitation: the same function as timm's model."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, _tf_cfg

    tf = _tf_cfg()
    conv = replace(tf["conv_cfg"], expand_ratio=2.0, kernel_size=5, attn_ratio=0.5)
    attention = replace(tf["transformer_cfg"], dim_head=16, expand_ratio=3.0, window_size=4, grid_size=2)
    config = MaxxVitCfg(
        embed_dim=(32, 64), depths=(1, 2), block_type=("M", "M"), stem_width=16, **tf | dict(conv_cfg=conv, transformer_cfg=attention)
    )
    theirs = MaxxVit(config, img_size=32, num_classes=5).double().eval()
    ours = vitarium.create_model(
        "maxvit_pico",
        dims=(32, 64),
        depths=(1, 2),
        strides=(2, 2),
        window_size=4,
        grid_size=2,
        head_dim=16,
        mlp_ratio=3,
        expand_ratio=2,
        se_ratio=0.5,
        kernel_size=5,
        num_classes=5,
    )
    generator = torch.Generator().manual_seed(0)
    state = {
        n: 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t
        for n, t in theirs.state_dict().items()
    }
    state = {n: t.abs() + 0.5 if n.endswith("running_var") else t for n, t in state.items()}
    theirs.load_state_dict(state)
    state = official(state)
    ours.double().eval().stages.load_state_dict(
        {n[7:]: t for n, t in state.items() if n.startswith("stages.")}
    )  # the stem's kernels differ
    x = torch.randn(2, 16, 16, 16, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for mine, other in zip(ours.stages, theirs.stages, strict=True):
            x, y = mine(x, ours.run_blocks), other(x)
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_without_a_layer_before_the_head_or_squeeze_and_excitation():
    model = vitarium.create_model("maxvit_pico", pre_logits=False, se_ratio=0, grid_size=2, num_classes=3).eval()
    names = list(model.state_dict())
    assert not [name for name in names if ".se." in name or "head_norm.fc" in name]
    image = torch.randn(2, 3, 17, 22)  # both maps are padded, to different sizes
    assert model(image).shape == (2, 3)
    torch.testing.assert_close(model(image)[1:], model(image[1:]), rtol=1e-4, atol=1e-5)
