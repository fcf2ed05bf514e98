"""Tests specific to FMViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from vitarium.backbones.fmvit import ConvMixer, FMViT, GroupMlp, LightAttention, order_of_blocks


def filled(model: nn.Module) -> nn.Module:
    """Fill parameters and statistics with random values."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


class Literal:
    """Literal implementation from a state dict of the training form."""

    def __init__(self, state: dict[str, Tensor], groups: tuple[int, ...] = (1, 2, 4)):
        self.state, self.groups = state, groups

    def bn(self, x: Tensor, at: str) -> Tensor:
        mean, var, weight, bias = (self.state[f"{at}.{n}"][None, :, None, None] for n in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(self, x: Tensor, at: str, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"], self.state.get(f"{at}.bias"), **options)

    def rep(self, x: Tensor, at: str, kernel: int, stride: int = 1, groups: int | tuple = 1, dilation: int = 1) -> Tensor:
        kernels = (kernel, 1) if kernel > 1 else (1,) * (len(groups) if isinstance(groups, tuple) else 2)
        groups = groups if isinstance(groups, tuple) else (groups,) * len(kernels)
        y = 0
        for i, (k, g) in enumerate(zip(kernels, groups, strict=True)):
            options = dict(stride=stride, groups=g, padding=dilation * (k // 2), dilation=dilation if k > 1 else 1)
            y = y + self.bn(self.conv(x, f"{at}.branches.{i}.conv", **options), f"{at}.branches.{i}.bn")
        return y + self.bn(x, f"{at}.identity") if f"{at}.identity.weight" in self.state else y

    def mean(self, x: Tensor, s: int) -> Tensor:
        """Means of cells, at the border over the existing pixels."""
        return F.avg_pool2d(x, s, ceil_mode=True, count_include_pad=False)

    def spread(self, x: Tensor, s: int, like: Tensor) -> Tensor:
        return x.repeat_interleave(s, 2).repeat_interleave(s, 3)[..., : like.shape[2], : like.shape[3]]

    def mlp(self, x: Tensor, at: str) -> Tensor:
        y = self.rep(self.bn(x, f"{at}.norm"), f"{at}.fc1", 1, groups=self.groups)
        return self.rep(F.gelu(y), f"{at}.fc2", 1, groups=self.groups)

    def attention(self, x: Tensor, at: str, s: int) -> Tensor:
        x = self.bn(x, f"{at}.norm")
        coarse = self.mean(x, s)
        value_map = self.rep(coarse, f"{at}.v", 1)
        heads, (height, width) = x.shape[1] // 32, x.shape[2:]
        q, k, v = (
            part.flatten(2).unflatten(1, (heads, size)).transpose(2, 3)
            for part, size in ((self.rep(x, f"{at}.q", 1), 16), (self.rep(coarse, f"{at}.k", 1), 16), (value_map, 32))
        )
        y = (q @ k.transpose(2, 3) * 16**-0.5).softmax(-1) @ v
        y = y.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))
        local = self.rep(value_map, f"{at}.local", 3, groups=x.shape[1])
        return self.rep(y + self.spread(local, s, x), f"{at}.proj", 1)

    def cfb(self, x: Tensor, at: str) -> Tensor:
        y = self.bn(self.rep(x, f"{at}.mixer.conv", 3, groups=x.shape[1] // 32), f"{at}.mixer.norm")
        x = x + self.conv(y.relu(), f"{at}.mixer.proj")
        return x + self.mlp(x, f"{at}.mlp")

    def fmb(self, x: Tensor, at: str, s: int) -> Tensor:
        t = self.rep(x, f"{at}.reduce", 1)
        low = t + self.attention(t, f"{at}.attn", s)
        h = self.rep(low, f"{at}.to_high", 1)
        groups = h.shape[1] // 32
        band = x - self.spread(self.mean(x, 2), 2, x)
        high = self.rep(h, f"{at}.near", 3, groups=groups) + self.rep(h, f"{at}.far", 3, groups=groups, dilation=2)
        y = torch.cat([low, high + self.rep(band, f"{at}.residue", 1)], 1)
        return y + self.mlp(y, f"{at}.mlp")

    def __call__(self, x: Tensor, orders: list[list[bool]], strides: tuple[int, int]) -> Tensor:
        for i, stride in ((0, strides[0]), (2, 1), (4, strides[1])):
            x = self.rep(x, f"stem.{i}", 3, stride).relu()
        for k, order in enumerate(orders):
            x = self.rep(self.mean(x, 2) if k else x, f"stages.{k}.downsample.conv", 1)
            for i, fusion in enumerate(order):
                at = f"stages.{k}.blocks.{i}"
                x = self.fmb(x, at, 2 ** (len(orders) - 1 - k)) if fusion else self.cfb(x, at)
        return F.linear(self.bn(x, "norm").mean((2, 3)), self.state["head.weight"], self.state["head.bias"])


def reference(model: FMViT) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    orders = [[hasattr(block, "reduce") for block in stage.blocks] for stage in model.stages]
    strides = tuple(model.stem[i].branches[0].conv.stride[0] for i in (0, 4))
    return lambda image: Literal(model.state_dict())(image, orders, strides)


@pytest.mark.identity
@pytest.mark.parametrize(
    ("fused", "dtype", "atol"), [(False, torch.float64, 1e-10), (True, torch.float64, 1e-10), (True, torch.float32, 1e-5)]
)
def test_equals_the_equations(fused: bool, dtype: torch.dtype, atol: float):
    torch.manual_seed(0)
    model = filled(vitarium.create_model("fmvit_pico", dims=(64, 96), fusions=(1, 2), convolutions=(2, 3), num_classes=7)).double()
    size = (34, 28) if dtype is torch.float64 else (32, 24)  # odd maps; with these weights attention is too sharp there for 24 bits
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    literal = reference(model)(image)
    assert isinstance(model, FMViT)
    model = model.fuse() if fused else model
    got = model.to(dtype)(image.to(dtype))
    scale = literal.abs().max().item()
    torch.testing.assert_close(got.double() / scale, literal / scale, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("t", 2.05), ("s", 6.26), ("m", 12.76), ("b", 23.75), ("l", 34.71)],
)
def test_parameter_counts_for_deployment(name: str, millions: float):
    model = vitarium.create_model(f"fmvit_{name}").fuse()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=3e-3)


def test_macs_for_deployment():
    from torch.utils.flop_counter import FlopCounterMode

    model = vitarium.create_model("fmvit_t").fuse()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(0.34e9, rel=0.01)


@pytest.mark.identity
@pytest.mark.parametrize("size", [(33, 20), (16, 16), (7, 41)])
def test_nothing_is_left_to_fold_and_nothing_changes(size: tuple[int, int]):
    model = filled(vitarium.create_model("fmvit_pico")).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model(image)
    assert [name for name, part in model.fuse().named_modules() if isinstance(part, nn.BatchNorm2d)] == ["norm"]
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-10)


@pytest.mark.identity
def test_without_pooling_it_is_plain_attention_with_16_channels_a_head():
    part = filled(LightAttention(64, 1)).double()
    with torch.no_grad():
        for bn in (part.local.branches[0].bn, part.local.branches[1].bn, part.local.identity):  # type: ignore[union-attr]
            bn.weight.zero_()
            bn.bias.zero_()
    x = torch.randn(2, 64, 5, 6, dtype=torch.float64)
    y = part.norm(x)
    q, k, v = (m.flatten(2).unflatten(1, (2, -1)).transpose(2, 3) for m in (part.q(y), part.k(y), part.v(y)))
    assert q.shape[-1] == k.shape[-1] == 16
    attended = ((q @ k.transpose(2, 3) / 4).softmax(-1) @ v).transpose(2, 3).reshape(x.shape)
    torch.testing.assert_close(part(x), part.proj(attended), rtol=0, atol=1e-12)


@pytest.mark.identity
@pytest.mark.parametrize("part", [lambda: GroupMlp(32, 2, (1, 2, 4), "relu"), lambda: ConvMixer(64), lambda: LightAttention(32, 2)])
def test_a_part_folds_by_itself_in_any_order(part):
    part = filled(part()).double()
    x = torch.randn(2, 64 if isinstance(part, ConvMixer) else 32, 6, 7, dtype=torch.float64)
    expected = part(x)
    for module in reversed(list(part.modules())):
        if fold := getattr(module, "fold", None):
            fold()
    torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-11)


def test_order_of_blocks():
    assert order_of_blocks(6, 2) == [False, False, False, True] * 2
    assert order_of_blocks(3, 2) == [False, False, True, False, True]
    assert order_of_blocks(2, 0) == [False, False]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_frequency_alone(share: float):
    model = vitarium.create_model("fmvit_pico", low_share=share, num_classes=3).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    assert ("attn" in names) == bool(share)
    assert ("near" in names) != bool(share)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(fusions=(1,)), "one value per stage"),
        (dict(dims=(24, 48)), "multiples of 32"),
        (dict(low_share=1.5), r"\[0, 1\]"),
        (dict(act="silu"), "gelu, relu"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("fmvit_pico", **options)
