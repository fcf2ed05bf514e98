"""Tests specific to MAFormer; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from vitarium.backbones.maformer import FUSIONS, FusionBlock, GlobalTokens, LocalAttention, MAFormer


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Convert a map to token rows (N, C)."""
    size = q.shape[1] // heads
    out = []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        logits = q[:, part] @ k[:, part].T / size**0.5
        out.append((logits if seen is None else logits.masked_fill(~seen, -torch.inf)).softmax(1) @ v[:, part])
    return torch.cat(out, 1)


def same_window(grid: tuple[int, int], size: int) -> Tensor:
    """Return which pairs of tokens of a grid share a window, (N, N)."""
    y, x = torch.arange(grid[0]).repeat_interleave(grid[1]) // size, torch.arange(grid[1]).repeat(grid[0]) // size
    return (y[:, None] == y) & (x[:, None] == x)


class Literal:
    """Literal implementation for one image, from a state dict."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def linear(self, x: Tensor, at: str) -> Tensor:
        return F.linear(x, self.state[f"{at}.weight"], self.state[f"{at}.bias"])

    def norm(self, x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{at}.weight"], self.state[f"{at}.bias"], 1e-6)

    def depthwise(self, x: Tensor, grid: tuple[int, int], at: str) -> Tensor:
        image = x.T.unflatten(1, grid)[None]
        return F.conv2d(image, self.state[f"{at}.weight"], self.state[f"{at}.bias"], padding=1, groups=x.shape[1])[0].flatten(1).T

    def mlp(self, x: Tensor, at: str) -> Tensor:
        return self.linear(F.gelu(self.linear(self.norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")

    def fused(self, x: Tensor, grid: tuple[int, int], heads: int, window: int, at: str) -> Tensor:
        normed = self.norm(x, f"{at}.norm1")
        q, k, v = self.linear(normed, f"{at}.attn.qkv").chunk(3, 1)
        y = attention(q, k, v, heads, same_window(grid, window)) + self.depthwise(v, grid, f"{at}.attn.local")
        y = x + self.linear(y, f"{at}.attn.proj")
        y = y + self.mlp(y, at)
        few = self.state[f"{at}.gld.weight"] @ normed + self.state[f"{at}.gld.positions"]
        k, v = self.linear(few, f"{at}.fusion.kv").chunk(2, 1)
        return y + self.linear(attention(self.linear(y, f"{at}.fusion.q"), k, v, heads), f"{at}.fusion.proj")

    def deep(self, x: Tensor, grid: tuple[int, int], heads: int, at: str) -> Tensor:
        x = x + self.depthwise(x, grid, f"{at}.position")
        q, k, v = self.linear(self.norm(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, 1)
        x = x + self.linear(attention(q, k, v, heads), f"{at}.attn.proj")
        return x + self.mlp(x, at)

    def __call__(self, image: Tensor, heads: tuple, depths: tuple, streams: int, patch: int, window: int) -> Tensor:
        x = image
        for k, depth in enumerate(depths):
            at = f"stages.{k}"
            x = F.conv2d(x, self.state[f"{at}.downsample.conv.weight"], self.state[f"{at}.downsample.conv.bias"], stride=2 if k else patch)
            grid = (x.shape[1], x.shape[2])
            rows = self.norm(x.flatten(1).T, f"{at}.downsample.norm")
            for i in range(depth):
                block = f"{at}.blocks.{i}"
                rows = self.fused(rows, grid, heads[k], window, block) if k < streams else self.deep(rows, grid, heads[k], block)
            x = rows.T.unflatten(1, grid)
        return self.linear(self.norm(rows, "norm").mean(0), "head")


def reference(model: MAFormer) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""
    two = [stage.blocks[0] for stage in model.stages if isinstance(stage.blocks[0], FusionBlock)]
    heads, depths = (tuple(f(stage.blocks) for stage in model.stages) for f in (lambda blocks: blocks[0].attn.num_heads, len))
    setting = heads, depths, len(two), model.feature_info[0]["reduction"], two[0].attn.window_size
    return lambda images: torch.stack([Literal(model.state_dict())(image, *setting) for image in images])


def filled(part: nn.Module) -> nn.Module:
    """Convert to float64 and fill with random values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in part.double().parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return part.eval()


@pytest.mark.identity
@pytest.mark.parametrize("window", [4, 3])
def test_equals_the_equations(window: int):
    """Windows of 3 do not divide the 8 x 8 map."""
    model = filled(vitarium.create_model("maformer_pico", window_size=window, num_classes=7))
    assert isinstance(model, MAFormer)
    image = torch.randn(3, 16, 16, dtype=torch.float64)
    literal = reference(model)(image[None])[0]
    torch.testing.assert_close(model(image[None])[0], literal, rtol=0, atol=1e-11)


@pytest.mark.identity
def test_windows_are_swins():
    """Equal to timm's window attention with zero biases if the convolution is zero."""
    from timm.models.swin_transformer import WindowAttention

    theirs = WindowAttention(16, 2, window_size=(4, 4)).double().eval()
    ours = LocalAttention(16, 2, 4).double().eval()
    for tensor in (theirs.relative_position_bias_table, ours.local.weight, ours.local.bias):
        nn.init.zeros_(tensor)  # type: ignore[arg-type]
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "relative" not in k}, strict=False)
    x = torch.randn(3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x, (4, 4)), theirs(x), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_the_identity_over_the_token_axis_hands_the_tokens_on():
    """Set the global tokens to LN x, so that the fusion is ordinary cross attention."""
    part = filled(FusionBlock(16, 2, (4, 4), 1.0, 4, 2.0, "cross", False, 0.0))
    assert isinstance(part, FusionBlock)
    assert part.gld is not None
    with torch.no_grad():
        part.gld.weight.copy_(torch.eye(16))
        part.gld.positions.zero_()
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    assert torch.equal(part.gld(part.norm1(x), (4, 4)), part.norm1(x))


@pytest.mark.identity
def test_one_window_and_no_fusion_is_an_ordinary_block():
    part = filled(FusionBlock(16, 2, (4, 4), 0.25, 4, 2.0, "cross", False, 0.0))
    assert isinstance(part, FusionBlock)
    assert part.attn is not None
    for tensor in (part.fusion.proj.weight, part.fusion.proj.bias, part.attn.local.weight, part.attn.local.bias):
        nn.init.zeros_(tensor)  # type: ignore[arg-type]
    ordinary = vitarium.nn.TransformerBlock(16, 2, mlp_ratio=2.0).double().eval()
    ordinary.load_state_dict({k: v for k, v in part.state_dict().items() if k in ordinary.state_dict()})
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(part(x, (4, 4)), ordinary(x), rtol=0, atol=1e-12)


def test_another_grid_keeps_the_sums_of_rows_where_they_are_equal():
    part = GlobalTokens(8, (8, 8), 0.25).double().eval()
    nn.init.constant_(part.weight, 1 / 64)
    for grid in ((4, 4), (12, 7), (1, 2), (16, 16)):
        weight, positions = part.at(grid)
        rows, columns = part.coarse(grid, 0.25)
        assert weight.shape == (rows * columns, grid[0] * grid[1])
        assert positions.shape == (rows * columns, 8)
        torch.testing.assert_close(weight.sum(1), torch.ones(rows * columns, dtype=torch.float64))


@pytest.mark.identity
def test_a_linear_layer_over_a_sixteenth_is_a_quarter_of_global_attention():
    from torch.utils.flop_counter import FlopCounterMode

    def macs(part: nn.Module, *args) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(*args)
        return counter.get_total_flops() / 2

    with torch.device("meta"):
        block = FusionBlock(64, 2, (56, 56), 1 / 16, 7, 4.0, "cross", False, 0.0).eval()
        full = vitarium.nn.TransformerBlock(64, 2).eval()
        x = torch.empty(1, 56 * 56, 64)
    assert macs(block, x, (56, 56)) < 0.25 * macs(full, x)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mlp_after", [False, True])
def test_fusions(fusion: str, mlp_after: bool):
    model = vitarium.create_model("maformer_pico", fusion=fusion, mlp_after=mlp_after, num_classes=3).eval()
    assert model(torch.randn(2, 3, 18, 21)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(depths=(1,)), "one value per stage"), (dict(shares=(0.0,)), r"\(0, 1\]"), (dict(fusion="sum"), "cross, add")],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("maformer_pico", **options)
