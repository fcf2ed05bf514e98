"""Tests specific to TiC; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import RESULTS, TOLERANCE, compare, fill_state, make_input, read_golden
from vitarium.backbones.tic import DIRECTIONS, MSAConv2d, NeighbourAttention, TiC, Tiling, neighbour_attention, neighbour_weights
from vitarium.errors import InputError

GOLDEN = "tic-msa-conv-3x3"


def test_equals_the_authors_layer():
    doc = read_golden(GOLDEN)
    layer = MSAConv2d(8, 16, 3).double().eval()
    layer.load_state_dict(fill_state(doc["state"]), strict=True)
    assert sum(p.numel() for p in layer.parameters()) == doc["parameters"]
    x = make_input("x", doc["inputs"]["x"])
    for dtype, tolerance in TOLERANCE.items():
        layer.to(dtype)
        with torch.no_grad():
            error = compare(GOLDEN, {"attention": layer.weights(x.to(dtype))[:, 0], "y": layer(x.to(dtype))})
        assert error <= tolerance
        if dtype is torch.float64:
            RESULTS.append((GOLDEN, error))


@pytest.mark.parametrize(("name", "millions"), [("tiny", 12.776), ("small", 22.265)])
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"tic_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def filled(part: nn.Module) -> nn.Module:
    """Convert to float64 and evaluation mode and fill with random values."""
    part.double().eval()
    with torch.no_grad():
        for name, tensor in part.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor))
    return part


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def fast(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: tuple[int, int], dilation: int = 1, *, masked: bool = False) -> Tensor:
    """Apply `neighbour_attention` to maps (B, C, H, W)."""
    tiling = Tiling.of(*q.shape[-2:], kernel, dilation, masked=masked)
    last = lambda x: x.permute(0, 2, 3, 1)
    return neighbour_attention(last(q), last(torch.cat([k, v], 1)), heads, tiling).permute(0, 3, 1, 2)


def unfolded(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: tuple[int, int], dilation: int = 1) -> Tensor:
    """Literal attention with keys and values copied k k times."""
    weights = neighbour_weights(q, k, heads, kernel, dilation)
    values = F.unfold(v, kernel, dilation, [dilation * (side // 2) for side in kernel])
    values = values.view(len(v), heads, v.shape[1] // heads, *weights.shape[2:])
    return (weights[:, :, None] * values).sum(3).flatten(1, 2)


def looped(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: tuple[int, int], dilation: int, masked: bool) -> Tensor:
    """Literal attention for one position, head and neighbour at a time."""
    (batch, dim, height, width), out = q.shape, torch.zeros_like(q)
    offsets = list(itertools.product(*(range(-(side // 2), side // 2 + 1) for side in kernel)))
    for b, head, y, x in itertools.product(range(batch), range(heads), range(height), range(width)):
        channels = slice(head * (dim // heads), (head + 1) * (dim // heads))
        logits, values = [], []
        for dy, dx in offsets:
            row, column = y + dilation * dy, x + dilation * dx
            inside = 0 <= row < height and 0 <= column < width
            if inside:
                logits.append(q[b, channels, y, x] @ k[b, channels, row, column] * (dim // heads) ** -0.5)
                values.append(v[b, channels, row, column])
            elif not masked:
                logits.append(q.new_zeros(()))
                values.append(torch.zeros_like(v[b, channels, 0, 0]))
        out[b, channels, y, x] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.identity
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kernel", "dilation", "heads"), [((3, 3), 1, 1), ((3, 5), 1, 2), ((3, 3), 2, 4), ((5, 1), 3, 2)])
def test_equals_the_loop(kernel: tuple[int, int], dilation: int, heads: int, masked: bool):
    q, k, v = (random(2, 4, 7, 6) for _ in range(3))
    expected = looped(q, k, v, heads, kernel, dilation, masked)
    torch.testing.assert_close(fast(q, k, v, heads, kernel, dilation, masked=masked), expected, rtol=0, atol=1e-12)
    if not masked:
        torch.testing.assert_close(unfolded(q, k, v, heads, kernel, dilation), expected, rtol=0, atol=1e-12)


@pytest.mark.identity
@pytest.mark.parametrize(("height", "width"), [(14, 14), (16, 9), (1, 23), (3, 2)])
def test_tiles_of_any_map(height: int, width: int):
    q, k, v = (random(1, 6, height, width) for _ in range(3))
    torch.testing.assert_close(fast(q, k, v, 3, (7, 7)), unfolded(q, k, v, 3, (7, 7)), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_window_of_one_gives_the_value():
    layer = MSAConv2d(6, 5, 1).double().eval()
    x = random(2, 6, 5, 4)
    torch.testing.assert_close(layer.attend(x), x + layer.qkv_conv(x)[:, 12:], rtol=0, atol=1e-12)


@pytest.mark.identity
def test_inside_it_moves_with_the_image():
    layer = MSAConv2d(4, 6, 3, dilation=2).double().eval()
    x = random(1, 4, 20, 20)
    moved = layer(x.roll((3, 5), (2, 3)))[:, :, 6:-3, 8:-3]
    torch.testing.assert_close(moved, layer(x)[:, :, 3:-6, 3:-8], rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_window_over_the_whole_map_is_global_attention():
    q, k, v = (random(2, 8, 5, 4) for _ in range(3))
    heads = lambda x: x.flatten(2).unflatten(1, (2, 4)).transpose(2, 3)
    expected = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(2, 3).reshape(q.shape)
    torch.testing.assert_close(fast(q, k, v, 2, (9, 7), masked=True), expected, rtol=0, atol=1e-12)


def test_masked_padding_trains():
    """Positions of a tile outside the map are discarded and must not produce NaN gradients."""
    layer = MSAConv2d(4, 4, 3, mask_padding=True)
    layer(torch.randn(2, 4, 9, 7)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


class Literal:
    """Literal implementation from a state dict: keys and values are rolled, averaged and unfolded."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def conv(self, x: Tensor, at: str, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"], self.state[f"{at}.bias"], **options)

    def linear(self, x: Tensor, at: str) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"][:, :, None, None], self.state[f"{at}.bias"])

    def bn(self, x: Tensor, at: str) -> Tensor:
        return F.batch_norm(x, *(self.state[f"{at}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))

    def ln(self, x: Tensor, at: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, shift = (self.state[f"{at}.{n}"][:, None, None] for n in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def attention(self, x: Tensor, at: str, heads: int, kernel: int, shift: int, directions: int) -> Tensor:
        (dim, height, width), kv_scales = x.shape[1:], self.state.get(f"{at}.pool_scales")
        q, kv = self.linear(x, f"{at}.qkv").split([dim, 2 * dim], 1)
        if kv_scales is not None:
            given = kv
            for r, scale in zip((2, 4), kv_scales, strict=True):
                total, count = (F.avg_pool2d(F.pad(m, (0, -width % r, 0, -height % r)), r) for m in (given, torch.ones_like(given)))
                spread = (total / count).repeat_interleave(r, 2).repeat_interleave(r, 3)[:, :, :height, :width]
                kv = kv + spread * scale[:, None, None]
        k, v = kv.chunk(2, 1)
        if directions:
            down, right = min(shift, height // 2), min(shift, width // 2)
            moved = [
                [part.roll((dy * down, dx * right), (2, 3)) for part, (dy, dx) in zip(m.chunk(directions, 1), DIRECTIONS, strict=False)]
                for m in (k, v)
            ]
            k, v = (torch.cat(parts, 1) for parts in moved)
        return self.linear(unfolded(q, k, v, heads, (kernel, kernel)), f"{at}.proj")

    def __call__(self, x: Tensor, depths, heads, kernel: int, strides, directions: int) -> Tensor:
        x = self.conv(x, "stages.0.downsample.conv1.conv", stride=strides[0], padding=1)
        x = self.conv(F.gelu(self.bn(x, "stages.0.downsample.conv1.bn")), "stages.0.downsample.conv2", stride=strides[1], padding=1)
        for s, depth in enumerate(depths):
            if s:
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
                x = self.bn(self.conv(x, f"stages.{s}.downsample.conv", stride=2), f"stages.{s}.downsample.bn")
            for i in range(depth):
                at = f"stages.{s}.blocks.{i}"
                y = self.ln(x, f"{at}.norm1")
                x = x + self.attention(y, f"{at}.attn", heads[s], kernel, kernel // 2 * 2**i, directions)
                y = self.linear(self.ln(x, f"{at}.norm2"), f"{at}.mlp.fc1")
                x = x + self.linear(F.gelu(y), f"{at}.mlp.fc2")
        return F.linear(self.ln(x, "norm").mean((2, 3)), self.state["head.weight"], self.state["head.bias"])


def reference(model: TiC) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    first = model.stages[0]
    strides = first.downsample.conv1.conv.stride[0], first.downsample.conv2.stride[0]
    mixers = [stage.blocks[0].attn for stage in model.stages]
    sizes = [len(stage.blocks) for stage in model.stages], [mixer.num_heads for mixer in mixers], mixers[0].kernel_size
    equations = Literal(dict(model.state_dict()))
    return lambda image: equations(image, *sizes, strides, mixers[0].directions)


@pytest.mark.identity
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("options", "directions"), [({}, 4), (dict(directions=8), 8), (dict(directions=0), 0), (dict(pools=()), 4)], ids=str
)
def test_equals_the_equations(options: dict, directions: int, fused: bool):
    model = filled(vitarium.create_model("tic_pico", num_classes=7, **options))
    image = random(2, 3, 33, 21)
    expected = reference(copy.deepcopy(model))(image)
    model = model.fuse() if fused else model
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules()) != fused
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-10)


@pytest.mark.identity
def test_without_shift_and_at_first_without_means_it_is_plain():
    part = NeighbourAttention(8, 2, 3, shift=1, directions=0, pools=(2, 4)).double()
    x = random(2, 6, 5, 8)
    q, k, v = part.qkv(x).permute(0, 3, 1, 2).chunk(3, 1)
    torch.testing.assert_close(part(x), part.proj(unfolded(q, k, v, 2, (3, 3)).permute(0, 2, 3, 1)), rtol=0, atol=1e-12)


def test_cost_is_linear_in_pixels():
    from vitarium.efficiency.profiler import count_macs

    model = vitarium.create_model("tic_tiny", num_classes=0, depths=(1, 1, 1, 1)).eval()
    small, large = (count_macs(model, size) for size in (224, 448))
    assert large / small == pytest.approx(4, rel=0.02)


def test_shifts_reach_further():
    """Receptive field of the centre of the first stage with one block: without shifts, that of stem and window."""
    image = torch.randn(1, 3, 64, 64)
    reach = []
    for options in (dict(directions=0, pools=()), dict(pools=())):
        torch.manual_seed(0)
        model = vitarium.create_model("tic_pico", depths=(3, 1), **options).eval()
        field = model.receptive_field(image, 0)
        assert field.shape == (1, 64, 64)
        assert field.max() == 1
        reach.append(int((field > 0).sum()))
    assert reach[0] < reach[1] / 2
    with pytest.raises(InputError, match="2 stages"):
        model.receptive_field(image, 5)


def test_any_convolution_can_be_replaced():
    net = nn.Sequential(MSAConv2d(3, 8, 5, stride=2, num_heads=3), MSAConv2d(8, 8, (1, 3), num_heads=8), nn.Conv2d(8, 2, 1))
    assert net(torch.randn(2, 3, 17, 12)).shape == (2, 2, 9, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(kernel_size=4), "must be odd"), (dict(dilation=0), "at least 1"), (dict(num_heads=4), "divisible by num_heads")],
)
def test_the_layer_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        MSAConv2d(6, 6, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depths=(1,)), "one value per stage"),
        (dict(kernel_size=6), "must be odd"),
        (dict(directions=3), "4 or 8"),
        (dict(pools=(1,)), "at least 2"),
        (dict(num_heads=(5, 4)), "divisible by num_heads"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("tic_pico", **options)
