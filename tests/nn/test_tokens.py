"""Padding hidden from attention, pooling and losses: padded equals packed, and an all-true mask changes no bit."""

from __future__ import annotations

import pytest
import torch

import vitarium
from vitarium.nn import TransformerBlock
from vitarium.nn.tokens import key_mask, masked_max, masked_mean

LENGTHS = (7, 3, 5)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def tokens() -> torch.Tensor:
    x = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.masked_fill(~MASK[..., None], 30.0)


def test_attention_of_a_padded_batch_equals_that_of_each_image(tokens):
    torch.manual_seed(0)
    block = TransformerBlock(16, 2).double().eval()
    with torch.no_grad():
        padded = block(tokens, key_mask(MASK))
        for row, x, length in zip(padded, tokens, LENGTHS, strict=True):
            torch.testing.assert_close(row[:length], block(x[None, :length])[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(block(tokens, key_mask(torch.ones_like(MASK))), block(tokens))
    assert key_mask(None) is None


@pytest.mark.parametrize(("pool", "plain"), [(masked_mean, torch.mean), (masked_max, torch.amax)])
def test_pooling_and_averages_leave_padding_out(tokens, pool, plain):
    with_nan = tokens.masked_fill(~MASK[..., None], torch.nan)
    for row, x, length in zip(pool(with_nan, MASK), tokens, LENGTHS, strict=True):
        torch.testing.assert_close(row, plain(x[:length], 0), rtol=1e-12, atol=1e-12)
    assert torch.equal(pool(tokens, torch.ones_like(MASK)), plain(tokens, 1))
    losses = tokens[..., 0].clone().requires_grad_(True)
    pool(losses, MASK).mean().backward()
    assert (losses.grad[~MASK] == 0).all()


@pytest.mark.parametrize("pool", ["avg", "max", "token"])
def test_a_plain_backbone_pools_real_patches(pool):
    model = vitarium.create_model("tnt_pico", num_classes=0).eval()
    model.global_pool = pool
    features = torch.randn(2, 1 + 16, model.num_features)
    mask = torch.ones(2, 16, dtype=torch.bool)
    assert torch.equal(model.pool(features, mask), model.pool(features))
    mask[1, 9:] = False
    got = model.pool(features, mask)
    assert torch.equal(got[0], model.pool(features)[0])
    torch.testing.assert_close(got[1], model.pool(features[1:, :10])[0])
