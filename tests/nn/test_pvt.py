"""Modules shared by PVTv2 and its successors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import rename
from vitarium.nn.pvt import GridMlp, OverlapPatchEmbed, ReducedAttention, pvt_rules


@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 22), (1, 3)])
@pytest.mark.parametrize("stride", [2, 4])
def test_overlapping_patches_cover_every_pixel(height, width, stride):
    part = OverlapPatchEmbed(3, 8, stride)
    y = part(torch.randn(1, 3, height, width))
    assert tuple(y.shape) == (1, -(-height // stride), -(-width // stride), 8)
    assert part.grid(height, width) == tuple(y.shape[1:3])


def test_overlapping_patches_take_another_kernel_and_layers_before_it():
    part = OverlapPatchEmbed(4, 8, 4, kernel_size=7, padding=2, conv=nn.Conv2d(3, 4, 1))
    x = torch.randn(1, 3, 20, 24)
    y = part(x)
    assert part.grid(20, 24) == tuple(y.shape[1:3]) == (5, 6)
    expected = F.conv2d(part.conv(x), part.proj.weight, part.proj.bias, 4, 2)
    torch.testing.assert_close(y, F.layer_norm(expected.permute(0, 2, 3, 1), (8,)))


class FirstTokens(ReducedAttention):
    def reduce(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x[:, : grid[1]]


@pytest.mark.identity
def test_reduced_attention_is_attention_to_the_reduced_tokens():
    part = FirstTokens(8, 2).double()
    x, bias = torch.randn(2, 12, 8, dtype=torch.float64), torch.randn(1, 2, 12, 4, dtype=torch.float64)
    k, v = part.kv(x[:, :4]).chunk(2, 2)
    heads = lambda t: t.unflatten(2, (2, 4)).transpose(1, 2)
    weights = (heads(part.q(x)) @ heads(k).mT / 2 + bias).softmax(-1)
    expected = part.proj((weights @ heads(v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, (3, 4), bias), expected)


def test_an_mlp_with_a_convolution_sees_the_neighbours_on_the_grid():
    part, x = GridMlp(4, 8), torch.randn(1, 12, 4)
    changed = x.clone()
    changed[:, 5] += 1  # row 1, column 1 of 3 x 4
    moved = (part(x, (3, 4)) != part(changed, (3, 4))).any(2)[0].view(3, 4)
    assert moved.tolist() == [[True, True, True, False]] * 3


def test_names_of_pvt_become_ours():
    names = [
        "patch_embed1.proj.weight",
        "block2.11.attn.sr.bias",
        "block2.0.mlp.dwconv.dwconv.weight",
        "norm2.bias",
        "head.weight",
        "block1.0.x.y",
    ]
    state = {name: torch.empty(0) for name in names}
    renamed = rename(*pvt_rules(2, (r"x\.", "z.")))(state)
    assert list(renamed) == [
        "stages.0.downsample.proj.weight",
        "stages.1.blocks.11.attn.sr.bias",
        "stages.1.blocks.0.mlp.dwconv.weight",
        "stages.1.norm.bias",
        "head.weight",
        "stages.0.blocks.0.z.y",
    ]
