"""Tests specific to VAN; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.van import VAN, GatedAttention, LargeKernelAttention
from vitarium.catalog import find_model
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.errors import InputError


def outputs(model: VAN, x: Tensor) -> dict[str, Tensor]:
    _, maps = model.forward_intermediates(x)
    return {f"stage{i + 1}": m.flatten(2).transpose(1, 2) for i, m in enumerate(maps)} | {"logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("van-b0_224", vitarium.create_model("van_b0"), outputs)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("b0", 4.1058), ("b1", 13.86), ("b2", 26.58), ("b3", 44.77), ("b4", 60.28), ("b5", 89.97), ("b6", 199.83)],
)
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"van_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_macs():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = vitarium.create_model("van_b0").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(0.87e9, rel=0.01)


def reference(model: VAN) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""

    def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)

    def literal(x: Tensor) -> Tensor:
        for stage in model.stages:
            x = norm(conv(x, stage.downsample.proj), stage.downsample.norm)
            for block in stage.blocks:
                y, attn, mlp = norm(x, block.norm1), block.attn, block.mlp
                u = F.gelu(conv(y, attn.proj_1))
                a = conv(conv(conv(u, attn.lka.conv0), attn.lka.conv_spatial), attn.lka.conv1)
                x = x + block.layer_scale_1[:, None, None] * (conv(u * a, attn.proj_2) + y)
                y = conv(F.gelu(conv(conv(norm(x, block.norm2), mlp.fc1), mlp.dwconv)), mlp.fc2)
                x = x + block.layer_scale_2[:, None, None] * y
            rows = x.flatten(2).transpose(1, 2)
            rows = F.layer_norm(rows, rows.shape[2:], stage.norm.weight, stage.norm.bias, stage.norm.eps)
            x = rows.transpose(1, 2).reshape(x.shape)
        return F.linear(x.mean((2, 3)), model.head.weight, model.head.bias)

    return literal


@pytest.mark.identity
def test_equals_the_equations():
    model = vitarium.create_model("van_pico", num_classes=7).double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    image = torch.randn(2, 3, 33, 20, dtype=torch.float64)
    torch.testing.assert_close(model(image), reference(model)(image), rtol=0, atol=1e-11)


def lka() -> LargeKernelAttention:
    part = LargeKernelAttention(4, 21, 3).double()
    for name, bias in part.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(bias)
    return part


@pytest.mark.identity
def test_an_impulse_reaches_exactly_23_by_23():
    """5 x 5, then 7 taps in steps of 3: 5 + 6 * 3."""
    part = lka()
    impulse = torch.zeros(1, 4, 31, 31, dtype=torch.float64)
    impulse[:, :, 15, 15] = 1
    for conv in (part.conv0, part.conv_spatial):
        nn.init.constant_(conv.weight, 0.5)
    reached = part.conv_spatial(part.conv0(impulse))[0, 0] != 0
    rows = reached.any(1).nonzero().flatten()
    assert (rows[0], rows[-1]) == (15 - 11, 15 + 11)
    assert reached[4:27, 4:27].all()
    assert reached.sum() == 23 * 23


@pytest.mark.identity
def test_the_two_kernels_are_one_large_kernel():
    part = lka()
    x = torch.randn(2, 4, 40, 37, dtype=torch.float64)
    holes = torch.zeros(4, 1, 19, 19, dtype=torch.float64)
    holes[:, :, ::3, ::3] = part.conv_spatial.weight.detach()
    whole = F.conv_transpose2d(holes.transpose(0, 1), part.conv0.weight, groups=4).transpose(0, 1)
    assert whole.shape == (4, 1, 23, 23)
    apart = part.conv_spatial(part.conv0(x))
    inside = (slice(None), slice(None), slice(11, -11), slice(11, -11))
    torch.testing.assert_close(apart[inside], F.conv2d(x, whole, padding=11, groups=4)[inside], rtol=0, atol=1e-12)


@pytest.mark.identity
def test_with_an_attention_of_one_only_convolutions_remain():
    part = GatedAttention(6, 21, 3, "multiply").double()
    nn.init.zeros_(part.lka.conv1.weight)
    nn.init.ones_(part.lka.conv1.bias)
    y = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    assert torch.equal(part(y), part.proj_2(F.gelu(part.proj_1(y))) + y)


@pytest.mark.identity
def test_folded_norms_change_nothing():
    model = vitarium.create_model("van_pico").double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    image = torch.randn(2, 3, 33, 20, dtype=torch.float64)
    expected = model.eval()(image)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in model.fuse().modules()) == 4  # the first of each block
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-12)


def test_attention_map():
    model = vitarium.create_model("van_pico").eval()
    assert model.attention_map(torch.randn(2, 3, 32, 24), stage=0).shape == (2, 16, 12)
    with pytest.raises(InputError, match="2 stages"):
        model.attention_map(torch.randn(2, 3, 32, 24), stage=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(gate="soft"), "multiply, sigmoid, add"), (dict(depths=(1,)), "one value per stage"), (dict(kernel_size=12), "even size")],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("van_pico", **options)


BACK = [
    (r"^stages\.(\d)\.downsample\.proj\.", r"van.encoder.stages.\1.embeddings.convolution."),
    (r"^stages\.(\d)\.downsample\.norm\.", r"van.encoder.stages.\1.embeddings.normalization."),
    (r"^stages\.(\d)\.norm\.", r"van.encoder.stages.\1.normalization."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.", r"van.encoder.stages.\1.layers.\2."),
    (r"^head\.", "classifier."),
    (r"\.norm1\.", ".pre_normomalization."),
    (r"\.norm2\.", ".post_normalization."),
    (r"\.layer_scale_1$", ".attention_scaling.weight"),
    (r"\.layer_scale_2$", ".mlp_scaling.weight"),
    (r"\.attn\.proj_1\.", ".attention.pre_projection.conv."),
    (r"\.attn\.proj_2\.", ".attention.post_projection."),
    (r"\.attn\.lka\.conv0\.", ".attention.attention_layer.attention.depth_wise."),
    (r"\.attn\.lka\.conv_spatial\.", ".attention.attention_layer.attention.depth_wise_dilated."),
    (r"\.attn\.lka\.conv1\.", ".attention.attention_layer.attention.point_wise."),
    (r"\.mlp\.fc1\.", ".mlp.in_dense."),
    (r"\.mlp\.dwconv\.", ".mlp.depth_wise."),
    (r"\.mlp\.fc2\.", ".mlp.out_dense."),
]
"""Our names -> those of the authors' files in the format of transformers."""


def test_files_in_the_format_of_transformers_load(tmp_path):
    source, model = (vitarium.create_model("van_pico", num_classes=3).eval() for _ in range(2))
    state = dict(source.state_dict())
    for pattern, new in BACK:
        state = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    assert not set(state) & set(source.state_dict())
    torch.save(state | {"van.layernorm.weight": torch.ones(48), "van.layernorm.bias": torch.zeros(48)}, tmp_path / "pytorch_model.bin")
    assert load_checkpoint(model, tmp_path / "pytorch_model.bin").complete
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(image), source(image))


@pytest.mark.parametrize("name", ["van_pico", "uniformer_dense_pico"])
def test_the_backbone_of_a_detectors_file_is_read(name: str):
    """Names below "backbone." are read without it, others are left out."""
    state = {"patch_embed1.proj.weight": torch.ones(1), "patch_embed2.norm.bias": torch.zeros(2)}
    whole = {f"backbone.{key}": tensor for key, tensor in state.items()} | {"neck.lateral_convs.0.weight": torch.zeros(1)}
    official = find_model(name)[0].dialects["official"]
    assert official(whole).keys() == official(state).keys()
