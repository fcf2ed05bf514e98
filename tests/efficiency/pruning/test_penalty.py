"""Penalties on attention: known values, and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vitarium
from tests.anatomy.models import NAMES, ROTARY, make, timm_model
from vitarium.efficiency.pruning.penalty import PENALTIES, AttentionPenalty, entropy, hoyer, log1p_sq
from vitarium.errors import UnsupportedModel, UsageError


@pytest.mark.identity
def test_even_and_one_hot_attention():
    even, one_hot = torch.zeros(2, 3, 9, 9, dtype=torch.float64), 1e4 * torch.eye(9, dtype=torch.float64).expand(2, 3, 9, 9)
    assert float(log1p_sq(even)) == pytest.approx(math.log(1 + 1 / 81), abs=1e-15)
    assert float(log1p_sq(one_hot)) == pytest.approx(math.log(2) / 9, abs=1e-15)
    assert [float(entropy(z)) for z in (even, one_hot)] == pytest.approx([1, 0], abs=1e-12)
    assert [float(hoyer(z)) for z in (even, one_hot)] == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.identity
@pytest.mark.parametrize("kind", PENALTIES)
def test_gradients_are_those_of_finite_differences(kind: str):
    logits = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PENALTIES[kind], logits)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(ROTARY)])
def test_it_reads_every_model_and_leaves_it_alone(name: str):
    model, image = make(name), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(image)
        with AttentionPenalty(weight=1.0, blocks="all").watch(model) as term:
            assert torch.equal(model(image), before)
        assert 0 < float(term()) < math.log(2)
    assert not any(m._forward_hooks for m in model.modules())


def test_it_is_the_attention_that_the_model_computes():
    model, seen = timm_model("vit"), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad(), AttentionPenalty(weight=2.0, blocks="all").watch(model) as term:
        model(torch.randn(2, 3, 16, 16))
        want = 2 * torch.stack([a.square().log1p().mean() for a in seen]).mean()
        torch.testing.assert_close(term(), want)


def test_it_teaches_queries_and_keys_of_its_blocks():
    model = timm_model("vit")
    with AttentionPenalty().watch(model) as term:
        model(torch.randn(2, 3, 16, 16))
    term().backward()
    assert model.blocks[-1].attn.qkv.weight.grad[:48].abs().sum() > 0
    assert model.blocks[-1].attn.qkv.weight.grad[48:].abs().sum() == 0
    assert model.blocks[-1].mlp.fc1.weight.grad is None


def test_together_with_token_reduction():
    model = vitarium.apply(timm_model("vit"), "evit:keep=0.5", quiet=True)
    with AttentionPenalty(weight=1.0).watch(model) as term:
        model(torch.randn(2, 3, 16, 16))
    assert float(term().detach()) > 0


def test_mistakes_are_refused():
    with pytest.raises(UsageError, match="one of log1p_sq, l1, entropy, hoyer"):
        AttentionPenalty("l2")
    with pytest.raises(UsageError, match="'last' or 'all'"):
        AttentionPenalty(blocks="first")
    with AttentionPenalty().watch(timm_model("vit")) as term, pytest.raises(UsageError, match="has recorded no forward pass"):
        term()
    for model, message in ((timm_model("dinov3"), "by position"), (nn.Linear(2, 2), "no plain vision transformer")):
        with pytest.raises(UnsupportedModel, match=message), AttentionPenalty().watch(model):
            pass
