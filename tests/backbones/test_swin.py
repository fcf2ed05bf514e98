"""Tests specific to Swin; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import assert_matches_golden, fill_value
from vitarium.backbones.swin import DIALECTS, OFFICIAL, PatchMerging, Swin, SwinBlock, SwinMlp
from vitarium.errors import UsageError
from vitarium.nn import WindowAttention
from vitarium.ops.windows import window_layout, window_partition, window_reverse


def outputs(model: Swin, x: Tensor) -> dict[str, Tensor]:
    features, maps = model.forward_intermediates(x)
    tokens = {f"stage{i + 1}": m.flatten(2).transpose(1, 2) for i, m in enumerate(maps)}
    return tokens | {"features": model.forward_head(features, pre_logits=True), "logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("swin-tiny_w7_224", vitarium.create_model("swin_tiny"), outputs)


def test_mlp_equals_the_authors_model():
    model = SwinMlp(embed_dim=64, depths=(2, 2, 2, 2), num_heads=(4, 8, 16, 32), num_classes=10)
    assert_matches_golden("swin-mlp_c16_w7_224", model, outputs)


def test_absolute_positions_equal_the_authors_model():
    """Also without biases of the projections and without a norm of the patches."""
    model = Swin(
        **dict(embed_dim=64, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=4, mlp_ratio=3.0, num_classes=10),
        **dict(qkv_bias=False, patch_norm=False, pos_embed=True, image_size=(256, 128)),
    )
    assert_matches_golden("swin-ape_w4_256x128", model, outputs)


def test_positions_of_a_rectangle_are_saved(tmp_path):
    model = vitarium.create_model("swin_pico", pos_embed=True, image_size=(16, 32), num_classes=3).eval()
    assert model.pos_embed.shape == (1, 4 * 8, 40)
    assert model.preprocessing.image_size == 32
    vitarium.save(model, tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 16, 32)
    assert torch.equal(vitarium.load(tmp_path / "model.safetensors").eval()(image), model(image))
    for name, size in (("swin_pico", (16, 0)), ("swin_pico", "16"), ("convnext_pico", (16, 32)), ("convit_pico", (16, 32))):
        with pytest.raises(UsageError, match=r"image_size|convit_pico cannot be built"):
            vitarium.create_model(name, image_size=size)


def test_absolute_positions_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(embed_dim=24, depths=[1, 2], num_heads=[2, 3], window_size=4, mlp_ratio=2.0, qkv_bias=False)
    config = transformers.SwinConfig(**sizes, image_size=64, use_absolute_embeddings=True, num_labels=5)
    theirs = transformers.SwinForImageClassification(config).eval()
    theirs.load_state_dict({k: fill_value(k, v) for k, v in theirs.state_dict().items()})
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    ours = vitarium.create_model("swin_tiny", image_size=64, pos_embed=True, checkpoint=file, **sizes).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def test_windows_per_stage_are_those_that_the_authors_narrow():
    """At 96 pixels the authors' (and timm's) windows of 12 become 6 and 3 in the last stages, with tables of that size."""
    from timm.models.swin_transformer import SwinTransformer

    sizes = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=5)
    theirs = SwinTransformer(img_size=96, window_size=12, **sizes).eval()
    theirs.load_state_dict({k: fill_value(k, v) for k, v in theirs.state_dict().items()})
    ours = vitarium.create_model("swin_tiny", window_size=(12, 12, 6, 3), **sizes).eval()
    ours.load_state_dict(DIALECTS["timm"](theirs.state_dict()))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_scale_of_the_logits_is_an_argument():
    """Queries that are scaled by the ratio of two scales give the same logits."""
    usual, other = (vitarium.create_model("swin_pico", num_classes=3, **option).eval() for option in ({}, {"qk_scale": 0.25}))
    other.load_state_dict(usual.state_dict())
    for mine, theirs in zip(usual.modules(), other.modules(), strict=True):
        if isinstance(mine, WindowAttention):
            theirs.qkv.weight.data[: mine.qkv.in_features] *= mine.scale / 0.25
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(other(x), usual(x))


def detector(model: Swin) -> dict[str, Tensor]:
    """Return a state with the tensor names of the authors' detectors, filled from a model with stage norms."""
    names = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            continue
        theirs = (
            name.replace("stage_norms.", "norm")
            .replace("stages.", "layers.")
            .replace("position_bias.table", "relative_position_bias_table")
        )
        if theirs.startswith("layers.1.downsample"):
            theirs = theirs.replace("layers.1", "layers.0")
        names["backbone." + theirs] = tensor
    return names | {"neck.lateral_convs.0.conv.weight": torch.zeros(3), "roi_head.bbox_head.fc_cls.bias": torch.zeros(81)}


def test_detectors_files_load_with_a_norm_per_stage(tmp_path):
    source = vitarium.create_model("swin_pico", num_classes=0, stage_norms=True).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    torch.save({"meta": {}, "state_dict": detector(source)}, tmp_path / "mask_rcnn.pth")
    model = vitarium.create_model("swin_pico", num_classes=0, stage_norms=True, checkpoint=tmp_path / "mask_rcnn.pth").eval()
    x = torch.randn(1, 3, 16, 16)
    for ours, theirs in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (model, source)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.identity
def test_stage_norms_are_applied_to_the_outputs_alone():
    model = vitarium.create_model("swin_pico", num_classes=0, stage_norms=True).eval()
    x = torch.randn(1, 3, 16, 16)
    normed = model.forward_intermediates(x, intermediates_only=True)
    norms, model.stage_norms = model.stage_norms, nn.ModuleList([nn.Identity(), nn.Identity()])
    plain = model.forward_intermediates(x, intermediates_only=True)
    for norm, a, b in zip(norms, plain, normed, strict=True):
        assert torch.equal(norm(a), b)


def test_simmim_files_of_transformers_load(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(embed_dim=24, depths=[1, 2], num_heads=[2, 3], window_size=4, image_size=64)
    theirs = transformers.SwinForMaskedImageModeling(config).eval()
    theirs.save_pretrained(tmp_path)
    sizes = dict(embed_dim=24, depths=(1, 2), num_heads=(2, 3), window_size=4, num_classes=0)
    ours = vitarium.create_model("swin_tiny", checkpoint=tmp_path / "model.safetensors", **sizes).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.swin(x).last_hidden_state
        torch.testing.assert_close(ours.forward_features(x).flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_simmim_files_load(tmp_path, wrapped: bool):
    model = vitarium.create_model("swin_pico", num_classes=0)
    state = {name.removeprefix("backbone."): t for name, t in detector(model).items() if name.startswith("backbone.")}
    dim = model.num_features
    extra = {
        "encoder.mask_token": torch.zeros(1, 1, 40),
        "decoder.0.weight": torch.zeros(192, dim, 1, 1),
        "decoder.0.bias": torch.zeros(192),
    }
    simmim = {f"encoder.{name}": tensor for name, tensor in state.items()} | extra
    assert OFFICIAL(simmim).keys() == model.state_dict().keys()
    torch.save({"model": simmim} if wrapped else simmim, tmp_path / "simmim.pth")
    vitarium.create_model("swin_pico", num_classes=0, checkpoint=tmp_path / "simmim.pth")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 28.288354), ("small", 49.606258), ("base", 87.768224), ("large", 196.532476), ("mlp_tiny_c24", 20.4), ("mlp_base", 60.7)],
)
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"swin_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.identity
def test_reverse_undoes_partition():
    x = torch.randn(2, 8, 12, 3)
    assert torch.equal(window_reverse(window_partition(x, 4), 4, 8, 12), x)


@pytest.mark.identity
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (0, 2)])
def test_block_equals_full_attention_with_an_explicit_mask(shift: tuple[int, int]):
    """Attention over all N tokens, masked to pairs in the same shifted window without wrap-around, plus the bias of the offset."""
    height, width, size, dim, heads = 8, 12, 4, 16, 2
    block = SwinBlock(dim, heads, size, 4.0, True, 0.0, 0.0).double().eval()
    nn.init.normal_(block.attn.position_bias.table)
    layout = window_layout(height, width, size, shift)
    x = torch.randn(2, height * width, dim, dtype=torch.float64)

    y = torch.arange(height).repeat_interleave(width)
    z = torch.arange(width).repeat(height)
    window = [
        torch.div(axis - s, size, rounding_mode="floor") for axis, s in zip((y, z), shift, strict=True)
    ]  # -1 is dropped, not wrapped around
    seen = (window[0][:, None] == window[0]) & (window[1][:, None] == window[1])
    offset = ((y[:, None] - y + size - 1) * (2 * size - 1) + z[:, None] - z + size - 1).clamp(0, (2 * size - 1) ** 2 - 1)
    bias = block.attn.position_bias.table[offset].permute(2, 0, 1).masked_fill(~seen, -100.0)
    q, k, v = block.attn.qkv(block.norm1(x)).view(2, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    attended = ((q @ k.transpose(-1, -2)) * (dim // heads) ** -0.5 + bias).softmax(-1) @ v
    expected = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
    expected = expected + block.mlp(block.norm2(expected))

    ours = block(x[:, layout.order], layout)[:, layout.inverse]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.identity
def test_one_window_over_the_map_is_plain_attention():
    """With M equal to the side of the map, the block permutes and masks nothing."""
    block = SwinBlock(16, 2, 6, 4.0, True, 0.0, 0.0).double().eval()
    nn.init.zeros_(block.attn.position_bias.table)
    x = torch.randn(2, 36, 16, dtype=torch.float64)
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(2, 36, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = x + attn.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, window_layout(6, 6, 6, (0, 0))), expected)


@pytest.mark.identity
def test_whole_windows_shift_with_a_cyclic_image():
    """Without the mask, rolling an image by one window rolls the map of the first stage by the same amount."""
    model = vitarium.create_model("swin_pico").double().eval()
    stage = model.stages[0]
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for layout in stage.layouts(8, 8, image.device):
        object.__setattr__(layout, "region", None)  # the cached layouts, without masks
    move = stage.window_size * model.patch_embed.patch_size
    (first, *_), (moved, *_) = (model.forward_intermediates(x, intermediates_only=True) for x in (image, image.roll(move, 3)))
    torch.testing.assert_close(moved, first.roll(stage.window_size, 3))


def test_merging_takes_the_columns_of_a_pair_last():
    """The channel order is (even row, even column), (odd, even), (even, odd), (odd, odd)."""
    merge = PatchMerging(1)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    assert merge(torch.arange(4.0).view(1, 2, 2, 1)).flatten().tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("size", [(224, 224), (96, 132), (32, 64), (64, 248)])
def test_padded_sizes_equal_torchvision(size: tuple[int, int]):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.SwinTransformer([4, 4], 24, [2, 2, 2], [2, 4, 8], [7, 7], num_classes=5).eval()
    theirs.load_state_dict({k: fill_value(k, v) for k, v in theirs.state_dict().items()})
    ours = Swin(embed_dim=24, depths=(2, 2, 2), num_heads=(2, 4, 8), num_classes=5).eval()
    ours.load_state_dict(DIALECTS["torchvision"](theirs.state_dict()))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_without_padding_the_authors_rule_decides_the_shift():
    stage = vitarium.create_model("swin_tiny").stages[3]
    assert stage.shift(7, 7) == (0, 0)
    assert stage.shift(7, 14) == (0, 0)  # the authors shift neither axis once a window covers the shorter side
    assert stage.shift(6, 14) == (0, 3)  # padded: torchvision's rule, axis by axis
    assert stage.shift(14, 14) == (3, 3)


def test_eval_keeps_the_bias_and_forgets_it_when_the_table_changes():
    model = vitarium.create_model("swin_pico", num_classes=4).eval()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(image)
        assert torch.equal(model(image), before)
        for part in model.modules():
            if hasattr(part, "position_bias"):
                part.position_bias.table.normal_()
        assert not torch.allclose(model(image), before)
    model(image).sum().backward()  # gradients reach the table in eval too
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("table"))


def test_bias_tables_resize_to_another_window():
    table = torch.arange(7.0)[:, None].expand(7, 7).reshape(49, 1)  # grows with the row's offset
    model = Swin(embed_dim=8, depths=(1,), num_heads=(1,), window_size=6, num_classes=2)
    resized = model.resize_tensor("stages.0.blocks.0.attn.position_bias.table", table, torch.Size([121, 1]))
    rows = resized.view(11, 11)
    assert (rows.diff(dim=0) > 0).all()
    assert torch.allclose(rows, rows[:, :1].expand(11, 11), atol=1e-5)
    assert model.resize_tensor("head.weight", table, torch.Size([1])) is None


def test_macs_grow_linearly_with_area():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = vitarium.create_model("swin_tiny").eval()
    macs = []
    for side in (224, 448):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, side, side, device="meta"))
        macs.append(counter.get_total_flops() / 2)
    assert macs[0] == pytest.approx(4.49e9, rel=0.01)
    assert macs[1] / macs[0] == pytest.approx(4, rel=0.01)


def test_the_papers_comparisons_are_arguments():
    still = vitarium.create_model("swin_pico", shifted=False)
    assert still.stages[0].shift(8, 8) == (0, 0)
    flat = vitarium.create_model("swin_pico", position_bias=False)
    tables = [p for name, p in flat.named_parameters() if name.endswith("table")]
    assert tables
    assert not any(table.requires_grad or table.any() for table in tables)


def test_refuses_stages_that_do_not_match():
    with pytest.raises(ValueError, match="one value per stage"):
        vitarium.create_model("swin_pico", depths=(2, 2, 2))
