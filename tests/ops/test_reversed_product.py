"""Tests of attention with reversed products."""

from __future__ import annotations

import pytest
import torch

from vitarium.ops.reversed_product import reversed_product


@pytest.mark.parametrize("piece", [1, 8 * 13 * 5, 8 * 13 * 13 * 2, 2**21])
def test_pieces_of_plain_inference_are_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch):
    """One sender at a time, five, two heads, all at once."""
    monkeypatch.setattr("vitarium.ops.reversed_product.PIECE_BYTES", {"cpu": piece})
    q, k, v = (torch.randn(2, 3, 13, d, dtype=torch.float64) for d in (8, 8, 9))
    want = (q @ k.mT).softmax(-1).mT @ v
    with torch.inference_mode():
        torch.testing.assert_close(reversed_product(q, k, v), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(reversed_product(q.requires_grad_(), k, v), want, rtol=0, atol=1e-12)


def test_nobody_and_empty_batches():
    with torch.inference_mode():
        assert reversed_product(torch.randn(0, 2, 5, 3), torch.randn(0, 2, 5, 3), torch.randn(0, 2, 5, 4)).shape == (0, 2, 5, 4)


def test_under_autocast():
    q, k, v = (torch.randn(2, 3, 13, 8) for _ in range(3))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = reversed_product(q, k, v.bfloat16())
    assert (half.float() - reversed_product(q.requires_grad_(), k, v)).abs().max() < 0.1
