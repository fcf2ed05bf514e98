"""Tests of attention and splitting of heads."""

from __future__ import annotations

import pytest
import torch

from vitarium.ops.attention import merge_heads, multi_head_attention, split_heads, split_packed_heads


@pytest.mark.identity
def test_heads_are_contiguous_groups_of_channels_and_merge_back():
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[:, 1], x[:, :, 4:8])
    assert torch.equal(merge_heads(heads), x)


@pytest.mark.identity
def test_a_packed_projection_splits_into_its_parts_first():
    q, k, v = (torch.randn(2, 5, 12) for _ in range(3))
    parts = split_packed_heads(torch.cat([q, k, v], 2), 3, 4)
    for part, expected in zip(parts, (q, k, v), strict=True):
        assert torch.equal(part, split_heads(expected, 4))


@pytest.mark.identity
def test_attention_with_narrow_queries_bias_and_scale_is_the_written_out_one():
    q, k, v = (torch.randn(2, n, c, dtype=torch.float64) for n, c in ((5, 6), (7, 6), (7, 12)))
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    got = multi_head_attention(q, k, v, 3, bias=bias, scale=0.3)
    for head in range(3):
        logits = 0.3 * q[..., 2 * head : 2 * head + 2] @ k[..., 2 * head : 2 * head + 2].mT + bias[:, head]
        expected = logits.softmax(-1) @ v[..., 4 * head : 4 * head + 4]
        torch.testing.assert_close(got[..., 4 * head : 4 * head + 4], expected)


def test_masked_keys_take_no_part():
    q, k, v = (torch.randn(1, n, 8) for n in (3, 4, 4))
    mask = torch.tensor([True, True, True, False])[None, None, None]
    torch.testing.assert_close(multi_head_attention(q, k, v, 2, bias=mask), multi_head_attention(q, k[:, :3], v[:, :3], 2))
