"""Tests specific to S2AFormer; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from vitarium.backbones.s2aformer import S2AFormer, StripSelfAttention


def filled(part: nn.Module) -> nn.Module:
    """Convert to float64 and fill parameters and statistics with random values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in part.double().state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor))
    return part.eval()


class Literal:
    """Literal implementation from a state dict."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def conv(self, x: Tensor, at: str, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"], self.state.get(f"{at}.bias"), **options)

    def depthwise(self, x: Tensor, at: str) -> Tensor:
        return self.conv(x, at, padding=1, groups=x.shape[1])

    def bn(self, x: Tensor, at: str) -> Tensor:
        mean, var, weight, bias = (self.state[f"{at}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def ln(self, x: Tensor, at: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * self.state[f"{at}.weight"][:, None, None] + self.state[f"{at}.bias"][:, None, None]

    def attention(self, x: Tensor, at: str, heads: int, r: int) -> Tensor:
        small = x
        if r > 1:
            padded = F.pad(x, (0, -x.shape[3] % r, 0, -x.shape[2] % r))
            small = self.ln(self.conv(padded, f"{at}.sr", stride=r, groups=x.shape[1]), f"{at}.sr_norm")
        q, k, v = (self.conv(m, f"{at}.{n}").flatten(2).chunk(heads, 1) for m, n in ((x, "q"), (small, "k"), (small, "v")))
        out = []
        for i in range(heads):
            a = (q[i].transpose(1, 2) @ k[i] * q[i].shape[1] ** -0.5).softmax(-1)
            out.append((a @ v[i].transpose(1, 2)).transpose(1, 2))
        return self.conv(torch.cat(out, 1).view(x.shape), f"{at}.proj")

    def lim(self, x: Tensor, at: str) -> Tensor:
        y = F.gelu(self.conv(self.bn(self.depthwise(x, f"{at}.dw1"), f"{at}.bn1"), f"{at}.pw1"))
        return self.conv(self.bn(self.depthwise(y, f"{at}.dw2"), f"{at}.bn2"), f"{at}.pw2")

    def mlp(self, x: Tensor, at: str) -> Tensor:
        return self.conv(F.gelu(self.depthwise(self.conv(x, f"{at}.fc1"), f"{at}.dw")), f"{at}.fc2")

    def __call__(self, x: Tensor, depths: tuple, heads: tuple, ratios: tuple, stem_stride: int) -> Tensor:
        for i in range(3):
            x = F.gelu(self.bn(self.conv(x, f"stem.{i}.conv", stride=1 if i else stem_stride, padding=1), f"stem.{i}.bn"))
        for k, depth in enumerate(depths):
            at = f"stages.{k}.downsample"
            x = self.bn(self.conv(x, f"{at}.conv", stride=2, padding=1), f"{at}.bn")
            for i in range(depth):
                at = f"stages.{k}.blocks.{i}"
                scale = {n: self.state[f"{at}.scales.{n}"][:, None, None] for n in ("attn", "lim", "mlp")}
                x = self.depthwise(x, f"{at}.dw") + x
                x = scale["attn"] * self.attention(self.ln(x, f"{at}.norms.attn"), f"{at}.branches.attn", heads[k], ratios[k]) + x
                x = scale["lim"] * self.lim(self.ln(x, f"{at}.norms.lim"), f"{at}.branches.lim") + x
                x = scale["mlp"] * self.mlp(self.ln(x, f"{at}.norms.mlp"), f"{at}.branches.mlp") + x
        x = self.ln(x.mean((2, 3), keepdim=True), "head_norm").flatten(1)
        return F.linear(x, self.state["head.weight"], self.state["head.bias"])


def reference(model: S2AFormer) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    attentions = [stage.blocks[0].branches["attn"] for stage in model.stages]
    heads, ratios = tuple(part.num_heads for part in attentions), tuple(part.sr_ratio for part in attentions)
    depths = tuple(len(stage.blocks) for stage in model.stages)
    return lambda image: Literal(model.state_dict())(image, depths, heads, ratios, model.stem[0].conv.stride[0])


@pytest.mark.identity
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (33, 21)])
def test_equals_the_equations(fused: bool, size: tuple[int, int]):
    model = filled(vitarium.create_model("s2aformer_pico", num_classes=7))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    literal = reference(model)(image)
    model = model.fuse() if fused else model
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules()) != fused
    torch.testing.assert_close(model(image), literal, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"), [("mini", 4.74, 0.43), ("t", 5.74, 0.65), ("xs", 6.56, 0.78), ("s", 10.91, 1.35), ("m", 24.24, 4.03)]
)
def test_parameters_and_macs(name: str, millions: float, gmacs: float):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = vitarium.create_model(f"s2aformer_{name}").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.identity
def test_at_full_width_and_without_reduction_it_is_plain_attention():
    part = filled(StripSelfAttention(12, 3, 1, qk_dim=4))
    plain = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.weight for layer in (part.q, part.k, part.v)])[:, :, 0, 0])
        plain.in_proj_bias.copy_(torch.cat([layer.bias for layer in (part.q, part.k, part.v)]))
        plain.out_proj.weight.copy_(part.proj.weight[:, :, 0, 0])
        plain.out_proj.bias.copy_(part.proj.bias)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    expected = plain(tokens, tokens, tokens)[0].transpose(1, 2).view(x.shape)
    torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-10)


@pytest.mark.identity
def test_equal_keys_give_the_mean_of_the_values():
    part = filled(StripSelfAttention(12, 3, 2))
    nn.init.zeros_(part.k.weight)
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    mean = part.v(part.reduce(x)).mean((2, 3), keepdim=True).expand(x.shape)
    torch.testing.assert_close(part(x), part.proj(mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [dict(qk_dim=None), dict(pool=True), dict(attention=False), dict(lim=False)])
def test_ablations(options: dict):
    model = vitarium.create_model("s2aformer_pico", num_classes=3, **options).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "words"), [(dict(depths=(1,)), "one value per stage"), (dict(num_heads=(5, 4)), "divisible by num_heads")]
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("s2aformer_pico", **options)
