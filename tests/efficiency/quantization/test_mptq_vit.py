"""MPTQ-ViT: equality with PTQ4ViT, and exact properties of its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.anatomy.models import NAMES, make, timm_model
from tests.golden import RESULTS, compare, fill_state, make_input, read_golden
from vitarium.catalog.probe import bytes_of
from vitarium.efficiency.quantization.allocation import greedy_allocation
from vitarium.efficiency.quantization.attention import SPLITS, round_softmax
from vitarium.efficiency.quantization.folding import find_pairs, fold, sqb
from vitarium.efficiency.quantization.hessian import fit_layer, fit_product
from vitarium.efficiency.quantization.mptq_vit import MPTQ, TwinUniform, TwoRegion, allocate_bits, is_post_gelu, layer_table
from vitarium.efficiency.quantization.ranges import squared_error, symmetric_step
from vitarium.errors import AttachError, UsageError
from vitarium.ops.number_formats import Integer

GELU_LOWEST = -0.16997124254703522


def twin(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """PTQ4ViT's grid after GELU: positives with a searched step, negatives with a fixed one."""
    half = 2 ** (bits - 1)
    below = -GELU_LOWEST / half
    return torch.where(x > 0, (x / step).round().clamp(0, half - 1) * step, (x / below).round().clamp(-half, 0) * below)


def split(p: Tensor, at: Tensor, bits: int) -> Tensor:
    """PTQ4ViT's split of attention weights as its code has it: both parts are added everywhere. `round_softmax` takes one."""
    top = 2 ** (bits - 1) - 1
    return (p.clamp(min=at) * top).round() / top + (p.clamp(max=at) * top / at).round() * at / top


@pytest.mark.parametrize("golden", ["mptq_vit-ptq4vit", "mptq_vit-ptq4vit-b"])
def test_the_search_equals_the_authors(golden: str):
    """The second with other bits for weights and inputs; its split is the first that an unrounded and a rounded product disagree on."""
    doc = read_golden(golden)
    state = fill_state(doc["state"])
    t = {name: make_input(name, spec) for name, spec in doc["inputs"].items()}
    bits = doc["config"].get("a_bits", 6)
    weights, inputs_format, n_v = Integer(doc["config"].get("w_bits", 6)), Integer(bits), doc["config"].get("n_V_lin", 3)
    outputs = {}

    def linear(prefix: str) -> nn.Linear:
        rows, columns = state[f"{prefix}.weight"].shape
        layer = nn.Linear(columns, rows).double()
        layer.load_state_dict({k: state[f"{prefix}.{k}"] for k in ("weight", "bias")})
        return layer

    def fit(name: str, layer, x: Tensor, g: Tensor, groups: int, rounding=inputs_format.quantize, first: Tensor | None = None):
        y = layer(x).detach()
        step, inputs = fit_layer(layer, x, y, g, weights, groups=groups, round_input=rounding, first_input=first)
        weight = weights.quantize(layer.weight.reshape(groups, -1), step).view_as(layer.weight)
        values = x if rounding is None else rounding(x, inputs)
        run = F.linear(values, weight, layer.bias) if isinstance(layer, nn.Linear) else layer._conv_forward(values, weight, layer.bias)
        outputs[f"{name}_out"] = run.detach()
        outputs[f"{name}_w_interval"] = step
        if inputs is not None:
            outputs[f"{name}_a_interval"] = inputs
        return values

    x, g = t["x"].flatten(0, 1), t["g"].flatten(0, 1)
    fit("lin", linear("fc"), x, g, n_v, first=symmetric_step(x.abs().max(), bits))
    x = F.gelu(x)
    first = symmetric_step(x.abs().max(), bits)
    outputs["gelu_xq"] = fit("gelu", linear("fc2"), x, g, 1, rounding=lambda x, s: twin(x, s, bits), first=first)

    rows, columns = state["conv.weight"].shape[:2]
    conv = nn.Conv2d(columns, rows, 3, padding=1).double()
    conv.load_state_dict({k: state[f"conv.{k}"] for k in ("weight", "bias")})
    fit("conv32", conv, t["img"], t["gi"], rows, rounding=None)
    fit("conv", conv, t["img"], t["gi"], rows, first=symmetric_step(t["img"].abs().max(), bits))

    def heads(x: Tensor) -> Tensor:
        return symmetric_step(x.abs().amax((0, 2, 3)).view(-1, 1, 1), bits)

    q, k, v = t["q"], t["k"].transpose(-2, -1), t["v"]
    rounded = inputs_format.quantize
    a, b = fit_product(q, k, q @ k, t["gq"], round_a=rounded, round_b=rounded, first_a=heads(q), first_b=heads(k))
    outputs |= {"qk_A_interval": a, "qk_B_interval": b, "qk_out": rounded(q, a) @ rounded(k, b)}
    p, one = (q @ k).softmax(-1), torch.ones(1, 1, 1, dtype=torch.float64)
    at, b = fit_product(
        p, v, p @ v, t["gv"], round_a=lambda p, at: split(p, at, bits), round_b=rounded, first_a=one, first_b=heads(v), candidates_a=SPLITS
    )
    outputs |= {"sos_split": at, "sos_B_interval": b, "sos_pq": split(p, at, bits)}
    outputs["sos_out"] = outputs["sos_pq"] @ rounded(v, b)
    outputs = {key: outputs[key].reshape(row["shape"]) for key, row in doc["outputs"].items()}
    error = compare(golden, outputs)
    assert error <= 1e-12
    RESULTS.append((golden, error))


def test_the_twin_grid_equals_the_authors():
    """Their golden's input after GELU, at its step; and the integer products give the same."""
    x = F.gelu(torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2)
    for bits in (4, 8):
        grid = TwinUniform(bits).double()
        grid.step = symmetric_step(x.max(), bits)
        torch.testing.assert_close(grid(x), twin(x, grid.step, bits), rtol=0, atol=1e-12)
        assert all(codes.dtype == torch.int8 for codes, _ in grid.terms(x))


def test_the_cosine_search_finds_the_smallest_angle():
    """PTQ4ViT's baseline: 100 factors from 0.5 to 1.2, one round, the mean cosine over rows within each block of outputs."""
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 6).double(), torch.randn(30, 10, dtype=torch.float64)
    y, format = layer(x).detach(), Integer(4)
    first = symmetric_step(x.abs().max(), 4)
    step, inputs = fit_layer(layer, x, y, None, format, groups=2, round_input=format.quantize, first_input=first, cosine=True)
    rows, start = layer.weight.detach().view(2, -1), symmetric_step(layer.weight.detach().view(2, -1).abs().amax(1, keepdim=True), 4)

    def out(values: Tensor, s: Tensor) -> Tensor:
        return F.linear(values, format.quantize(rows, s).view_as(layer.weight), layer.bias)

    for block in (0, 1):
        columns = slice(3 * block, 3 * block + 3)
        cosines = [
            F.cosine_similarity(out(format.quantize(x, first), start * (0.5 + 0.7 * i / 100))[:, columns], y[:, columns], dim=-1).mean()
            for i in range(100)
        ]
        best = int(torch.stack(cosines).argmax())
        torch.testing.assert_close(step[block], start[block] * (0.5 + 0.7 * best / 100))
    cosines = [F.cosine_similarity(out(format.quantize(x, first * (0.5 + 0.7 * i / 100)), step), y, dim=-1).mean() for i in range(100)]
    torch.testing.assert_close(inputs, first * (0.5 + 0.7 * int(torch.stack(cosines).argmax()) / 100))


PTQ4VIT = dict(smooth="none", gelu="twin", granularity="block", attention=True)
BASE_PTQ = dict(PTQ4VIT, search="cosine", gelu="uniform", softmax="uniform")


@pytest.mark.parametrize("options", [PTQ4VIT, BASE_PTQ, dict(PTQ4VIT, search="mse", softmax="uniform")], ids=str)
def test_ptq4vit_and_its_baseline_are_options(options: dict, images: Tensor, tmp_path):
    model = timm_model("vit", depth=1)
    with torch.no_grad():
        before = model(images)
        vitarium.apply(model, MPTQ(bits=8, calibration=images, **options), quiet=True)
        after = model(images)
        assert 0 < (after - before).norm() < 0.25 * (before - before.mean(0)).norm()
        state = model.methods[0].state
        steps = next(iter(state["attention"].values()))
        assert ("p" in steps) == (options.get("softmax") == "uniform")
        kinds = {row["layer"]: row["input"] for row in layer_table(model)}
        assert kinds["blocks.0.mlp.fc2"] == ("twin" if options["gelu"] == "twin" else "static")
        made = vitarium.create_model("timm/vit_pico", num_classes=4, depth=1).eval()
        vitarium.apply(made, MPTQ(bits=6, calibration=images[:2], **{"search": "mse", **options}), quiet=True)
        vitarium.save(made, tmp_path / "m.safetensors")
        assert torch.equal(vitarium.load(tmp_path / "m.safetensors")(images), made(images))


def test_one_output_has_no_angle():
    with pytest.raises(UsageError, match="use block or tensor"):
        MPTQ(search="cosine")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def quick(**options) -> MPTQ:
    return MPTQ(search="mse", **options)


# ---- SQ-b


@pytest.mark.identity
@pytest.mark.parametrize("name", NAMES)
def test_folding_leaves_the_float_model_as_it_is(name, images):
    """With a random shift and scale of every channel, in float64, wherever a norm is followed by linear layers alone."""
    model, images = make(name).double(), images.double()
    with torch.no_grad():
        before = model(images)
        pairs = find_pairs(model, images)
        assert len(pairs) >= 4  # of 2 a block
        for norm_name, names in pairs.items():
            norm = model.get_submodule(norm_name)
            b, s = torch.randn_like(norm.weight), torch.rand_like(norm.weight) + 0.5
            values, twins = fold(norm, [model.get_submodule(n) for n in names], b, s)
            norm.weight.data, norm.bias.data = values["weight"], values["bias"]
            for n, layer in zip(names, twins, strict=True):
                model.set_submodule(n, layer)
        torch.testing.assert_close(model(images), before, rtol=0, atol=1e-9)


@pytest.mark.identity
def test_sqb_without_shift_is_smoothquant():
    x, weight = torch.randn(50, 12, dtype=torch.float64) + 3, torch.randn(7, 12, dtype=torch.float64)
    low, high = x.aminmax(dim=0)
    b, s = sqb(low, high, weight, alpha=0.4, shift=False)
    assert torch.equal(b, torch.zeros(12, dtype=torch.float64))
    torch.testing.assert_close(s, x.abs().amax(0) ** 0.4 / weight.abs().amax(0) ** 0.6)


@pytest.mark.identity
def test_sqb_makes_channels_symmetric():
    x, weight = torch.randn(50, 12, dtype=torch.float64) + torch.linspace(-9, 9, 12).double(), torch.randn(7, 12, dtype=torch.float64)
    low, high = x.aminmax(dim=0)
    b, s = sqb(low, high, weight)
    low, high = ((x - b) / s).aminmax(dim=0)
    torch.testing.assert_close(low, -high)


def test_a_norm_that_is_read_elsewhere_is_not_folded():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.norm(x)
            return x + self.fc(x)

    assert find_pairs(PostNorm(), torch.randn(2, 6)) == {}
    assert find_pairs(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(2, 6)) == {"0": ("1",)}


# ---- OPT-m


@pytest.mark.identity
def test_one_step_and_no_negatives_are_a_uniform_grid():
    x = torch.rand(1000, dtype=torch.float64) * 7
    regions = TwoRegion.of(x, 5)._set_m(0)
    uniform = Integer(4, signed=False)
    assert torch.equal(regions(x), uniform.quantize(x, x.max() / 15))


def test_m_is_the_best_of_all_and_values_after_gelu_gain_by_it():
    x = F.gelu(torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    regions = TwoRegion.of(x, 4)
    least = squared_error(x, regions(x))
    others = [squared_error(x, copy.deepcopy(regions)._set_m(m)(x)) for m in range(9)]
    assert least == min(others)
    assert int(regions.m) == others.index(min(others)) > 0
    assert least < 0.7 * squared_error(x, Integer(4).quantize(x, symmetric_step(x.abs().max(), 4)))
    assert (regions(x[x < 0]) <= 0).all()


@pytest.mark.identity
def test_attention_weights_at_split_one_are_uniform():
    p, one = torch.rand(100, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(round_softmax(p, one, 6), (p * 31).round() / 31, rtol=0, atol=1e-15)
    fine = round_softmax(p * 0.01, one / 64, 6)
    torch.testing.assert_close(fine, p * 0.01, rtol=0, atol=0.51 / 64 / 31)


def test_inputs_after_gelu_are_known_by_their_range():
    assert is_post_gelu(torch.tensor(-0.17), torch.tensor(4.0))
    assert not is_post_gelu(torch.tensor(-3.0), torch.tensor(4.0))
    assert not is_post_gelu(torch.tensor(0.0), torch.tensor(4.0))
    model = timm_model("vit")
    vitarium.apply(model, quick(bits=6, calibration=torch.randn(4, 3, 16, 16)), quiet=True)
    kinds = {row["layer"]: row["input"] for row in layer_table(model)}
    assert kinds["blocks.0.mlp.fc2"] == "two_region"
    assert kinds["blocks.0.mlp.fc1"] == "static"
    assert kinds["patch_embed.proj"] == "float"


# ---- Greedy MP


@pytest.mark.identity
def test_each_greedy_step_takes_one_bit_from_one_layer():
    sizes, hurt = {"a": 100.0, "b": 10.0, "c": 1.0}, {"a": 5.0, "b": 1.0, "c": 0.1}
    found = greedy_allocation(sizes, lambda bits: sum(hurt[n] * 4.0 ** -bits[n] for n in bits), target=5.0)
    bits, mean = dict.fromkeys(sizes, 8), 8.0
    for layer, width, _, after in found.path:
        bits[layer] -= 1
        assert (bits[layer], after < mean) == (width, True)
        mean = after
    assert bits == found.bits
    assert min(bits.values()) >= 4
    assert sum(sizes[n] * b for n, b in bits.items()) / sum(sizes.values()) <= 5


def test_mixed_precision_reaches_the_mean_and_hurts_less_than_one_width(images):
    model = timm_model("vit", depth=2)
    table = allocate_bits(model, images, 4.0, widths=(3, 6), search="mse")
    assert not hasattr(model, "methods")
    sizes = {name: model.get_submodule(name).weight.numel() for name in table}
    assert sum(sizes[n] * w for n, (w, _) in table.items()) / sum(sizes.values()) <= 4
    assert len({w for w, _ in table.values()}) > 1
    vitarium.apply(model, quick(allocation=table, calibration=images), quiet=True)  # the table is an option of any run
    assert {row["layer"]: (row["weight_bits"], row["input_bits"] if row["input"] != "float" else row["weight_bits"])
            for row in layer_table(model)} == {n: (w, w if a == 32 else a) for n, (w, a) in table.items()}  # fmt: skip


# ---- the method


@pytest.mark.parametrize("name", ["timm-vit", "timm-qk_norm", "timm-eva02", "transformers-dinov2", "transformers-siglip"])
@pytest.mark.parametrize("options", [dict(bits=8), dict(bits=4, attention=True, granularity="block")], ids=str)
def test_it_works_and_undoes_exactly(name, options, images):
    model = make(name)
    modules = dict(model.named_modules())
    with torch.no_grad():
        before = model(images)
        vitarium.apply(model, quick(calibration=images, **options), quiet=True)
        after = model(images)
        assert after.isfinite().all()
        assert not torch.equal(after, before)
        if options["bits"] == 8:
            assert (after - before).norm() < 0.25 * (before - before.mean(0)).norm()
        vitarium.undo(model)
        assert dict(model.named_modules()) == modules
        assert torch.equal(model(images), before)


def test_more_bits_hurt_less_and_the_hessian_is_used(images):
    model = timm_model("vit", depth=2)
    with torch.no_grad():
        before, errors = model(images), []
        for bits in (3, 5, 8):
            vitarium.apply(model, MPTQ(bits=bits, calibration=images), quiet=True)
            errors.append(float((model(images) - before).norm()))
            vitarium.undo(model)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["swin_pico", "convnext_pico"])
def test_models_without_anatomy(name):
    model = vitarium.create_model(name, num_classes=5).eval()
    size = model.preprocessing.image_size
    images = torch.randn(4, model.preprocessing.channels, size, size)
    vitarium.apply(model, quick(bits=6, calibration=images), quiet=True)
    with torch.no_grad():
        assert model(images).isfinite().all()
    with pytest.raises(UsageError):
        vitarium.apply(vitarium.create_model(name, num_classes=5), quick(attention=True, calibration=images), quiet=True)


def test_four_bits_are_half_a_byte(images):
    model = timm_model("vit")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    other = bytes_of(model) - 4 * weights
    vitarium.apply(model, quick(bits=4, granularity="tensor", calibration=images), quiet=True)
    assert weights / 2 <= bytes_of(model) - other <= weights / 2 + 400  # steps and shifted biases


def test_a_failure_leaves_the_model_as_it_was(images, monkeypatch):
    model = timm_model("vit")
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())

    def fail(*_, **__):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("vitarium.efficiency.quantization.mptq_vit.exchange", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        vitarium.apply(model, quick(calibration=images), quiet=True)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=9), "bits must be a whole number from 3 to 8, got 9"),
        (dict(bits=4, weight_bits=1), "weight_bits must be a whole number from 2 to 8 or null, got 1"),
        (dict(search="best"), "search must be 'hessian', 'cosine', 'mse' or 'minmax', got 'best'"),
        (dict(mean_bits=3), "mean_bits must lie between the widths 4 and 8"),
        (dict(widths=(8, 4)), "widths must be .narrowest, widest."),
        (dict(widths=(1, 4)), "widths must be .a whole number from 2 to 8; a whole number from 2 to 8., got .1, 4."),
        (dict(activation_bits=16), "from 3 to 8, 32 or null, got 16"),
        (dict(bits=True), "bits must be a whole number from 3 to 8, got True"),
        (dict(smooth="scal"), "did you mean scale"),
        (dict(bit=4), "has no option 'bit'; did you mean bits"),
        (dict(alpha=2), "alpha must be a number from 0 to 1, got 2"),
    ],
)
def test_wrong_options_say_what_is_right(options, message):
    with pytest.raises(UsageError, match=message):
        MPTQ(**options)


@pytest.mark.parametrize("calibration", [None, [], [torch.randn(3, 16, 16)], ["x"]])
def test_wrong_calibration_says_what_is_right(calibration):
    with pytest.raises(UsageError, match="calibration"):
        vitarium.apply(timm_model("vit"), MPTQ(calibration=calibration), quiet=True)


def test_a_model_without_layers_is_refused():
    with pytest.raises(AttachError):
        vitarium.apply(nn.Sequential(nn.ReLU(), nn.Flatten()), MPTQ(calibration=torch.randn(2, 3, 4, 4)), quiet=True)
