"""Tests specific to HorNet; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.hornet import GlobalLocalFilter, GnConv, HorNet
from vitarium.catalog import rename
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.errors import UsageError


def outputs(model: HorNet, x: Tensor) -> dict[str, Tensor]:
    features, maps = model.forward_intermediates(x)
    stages = {f"stage{i + 1}": m for i, m in enumerate(maps)}
    return stages | {"features": model.forward_head(features, pre_logits=True), "logits": model(x)}


def test_equals_the_authors_model():
    assert_matches_golden("hornet-tiny_7x7_224", vitarium.create_model("hornet_tiny"), outputs)


def test_with_global_filters_equals_the_authors_model():
    model = vitarium.create_model("hornet_tiny_gf", depths=(1, 1, 2, 1), num_classes=10)
    assert_matches_golden("hornet-gf_224", model, outputs)


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [("tiny", 22.409512, 1e-6), ("tiny_gf", 23, 0.03), ("small", 50, 0.02), ("base", 87, 0.01), ("base_gf", 88, 0.01)],
)
def test_parameter_counts(name: str, millions: float, within: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"hornet_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def test_parameters_of_the_large_models_differ_as_in_the_paper():
    """The paper gives 209, 211 and 216 M; the first has 194.5 M by the architecture with 1,000 classes, so differences are compared."""
    with torch.device("meta"):
        plain, gf, wide = (sum(p.numel() for p in vitarium.create_model(f"hornet_large{n}").parameters()) for n in ("", "_gf", "_gf_384"))
    assert (gf - plain) / 1e6 == pytest.approx(2, abs=0.6)
    assert (wide - gf) / 1e6 == pytest.approx(5, abs=0.6)


def reference(model: HorNet) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""

    def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, 1, layer.groups)

    def norm(x: Tensor, layer: nn.Module) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return layer.weight[:, None, None] * ((x - mean) / (var + 1e-6).sqrt()) + layer.bias[:, None, None]

    def product(x: Tensor, part: GnConv) -> Tensor:
        dims = [x.shape[1] // 2**k for k in reversed(range(1 + len(part.pws)))]
        p, q = conv(x, part.proj_in).split([dims[0], sum(dims)], 1)
        *gates, last = (conv(q, part.dwconv) / 3).split(dims, 1)
        for gate, layer in zip(gates, part.pws, strict=True):
            p = conv(p * gate, layer)
        return conv(p * last, part.proj_out)

    def literal(image: Tensor) -> Tensor:
        x = norm(conv(image, model.stem.conv), model.stem.norm)
        for k, stage in enumerate(model.stages):
            x = conv(norm(x, stage.downsample.norm), stage.downsample.conv) if k else x
            for block in stage.blocks:
                x = x + block.gamma1[:, None, None] * product(norm(x, block.norm1), block.gnconv)
                y = norm(x, block.norm2).permute(0, 2, 3, 1)
                y = F.linear(F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight, block.mlp.fc2.bias)
                x = x + (block.gamma2 * y).permute(0, 3, 1, 2)
        x = norm(x.mean((2, 3), keepdim=True), model.head_norm).flatten(1)
        return F.linear(x, model.head.weight, model.head.bias)

    return literal


@pytest.mark.identity
def test_equals_the_equations():
    """For the models with 7 x 7 kernels."""
    model = vitarium.create_model("hornet_pico", num_classes=7).double().eval()
    image = torch.randn(2, 3, 34, 20, dtype=torch.float64)
    torch.testing.assert_close(model(image), reference(model)(image), rtol=0, atol=1e-11)


def silent(part: nn.Module) -> nn.Module:
    """With zero biases."""
    for name, parameter in part.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return part


@pytest.mark.identity
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_n_is_a_polynomial_of_degree_n_plus_1(order: int):
    part = silent(GnConv(16, order).double())
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(part(1.5 * x), 1.5 ** (order + 1) * part(x), rtol=1e-10, atol=1e-14)


@pytest.mark.identity
def test_a_filter_of_ones_leaves_its_half_alone_and_the_halves_alternate():
    part = GlobalLocalFilter(6, (8, 5)).double()
    part.pre_norm = part.post_norm = nn.Identity()
    nn.init.zeros_(part.complex_weight)
    part.complex_weight.data[..., 0] = 1
    nn.init.zeros_(part.dw.weight)
    part.dw.weight.data[:, :, 1, 1] = 2
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    y = part(x)
    torch.testing.assert_close(y[:, ::2], 2 * x[:, :3])
    torch.testing.assert_close(y[:, 1::2], x[:, 3:])


@pytest.mark.identity
def test_with_factors_of_zero_only_stem_and_downsampling_remain():
    model = vitarium.create_model("hornet_pico").double().eval()
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.zeros_(parameter)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model.stem(image)
    for stage in model.stages:
        expected = stage.downsample(expected)
    torch.testing.assert_close(model.forward_features(image), expected)


def test_global_filters_take_any_size_and_learn():
    model = vitarium.create_model("hornet_pico", filters=(None, (4, 3)))
    for size in ((16, 16), (23, 40)):
        model(torch.randn(2, 3, *size)).square().sum().backward()
    assert model.stages[1].blocks[0].gnconv.dwconv.complex_weight.grad.abs().sum() > 0
    assert "stages.1.blocks.0.gnconv.dwconv.complex_weight" in model.no_weight_decay()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(torch.randn(2, 3, 16, 16)).isfinite().all()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(compiled(image), model(image))


@pytest.mark.parametrize(("options", "words"), [(dict(orders=(2,)), "one value per stage"), (dict(orders=(2, 6)), "multiple of 32")])
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("hornet_pico", **options)


def test_without_factors():
    """layer_scale_init_value=0 leaves them out, as in the authors' code; integers are accepted."""
    plain, scaled = (vitarium.create_model("hornet_pico", layer_scale_init_value=value, num_classes=5).eval() for value in (0, 1))
    assert not [name for name in plain.state_dict() if "gamma" in name]
    assert scaled.stages[0].blocks[0].gamma1.dtype is torch.float32
    scaled.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(image), scaled(image), rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="at least 0"):
        vitarium.create_model("hornet_pico", layer_scale_init_value=-1)


def test_scale_of_the_gates():
    """A factor s on all gates of a gnConv of order n scales its output, without bias, by s^n."""
    one, other = (GnConv(8, 2, scale=scale).double() for scale in (1, 0.5))
    for parameter in (one.pws[0].bias, one.proj_out.bias):
        nn.init.zeros_(parameter)
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(other(x), one(x) / 4, rtol=1e-12, atol=1e-12)
    assert vitarium.create_model("hornet_pico", scale=0.5).stages[1].blocks[0].gnconv.scale == 0.5


def test_norm_of_each_stage_as_in_the_authors_detectors(tmp_path):
    """Each map has its own norm, which the next stage does not see; the names of a detector's file load."""
    plain = vitarium.create_model("hornet_pico", num_classes=0).eval()
    normed = vitarium.create_model("hornet_pico", num_classes=0, stage_norms=True).eval()
    theirs = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith("head_norm")}
    back = [(r"^stem\.conv", "downsample_layers.0.0"), (r"^stem\.norm", "downsample_layers.0.1")]
    back += [
        (r"^stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.0"),
        (r"^stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.1"),
    ]
    back += [(r"^(stages\.\d)\.blocks\.(\d+)\.mlp\.fc(\d)", r"\1.\2.pwconv\3"), (r"^(stages\.\d)\.blocks\.", r"\1.")]
    theirs = rename(*back)(theirs)
    for i, dim in enumerate((24, 48)):
        theirs |= {f"norm{i}.weight": torch.rand(dim), f"norm{i}.bias": torch.randn(dim)}
    state = {f"backbone.{name}": tensor for name, tensor in theirs.items()} | {"rpn_head.conv.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": state}, tmp_path / "mask_rcnn.pth")
    report = load_checkpoint(normed, tmp_path / "mask_rcnn.pth")
    assert report.complete
    image = torch.randn(2, 3, 16, 16)
    maps, found = (model.forward_intermediates(image, intermediates_only=True) for model in (plain, normed))
    for i, (x, y) in enumerate(zip(maps, found, strict=True)):
        want = F.layer_norm(x.movedim(1, -1), x.shape[1:2], theirs[f"norm{i}.weight"], theirs[f"norm{i}.bias"], 1e-6).movedim(-1, 1)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    vitarium.save(normed, tmp_path / "ours.safetensors")
    assert torch.equal(vitarium.load(tmp_path / "ours.safetensors")(image), normed(image))
