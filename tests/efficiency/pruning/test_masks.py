"""Masks on plain tensors, and zeros that survive optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitarium
from tests.anatomy.models import timm_model
from vitarium.efficiency.pruning.masks import Masks, keep_largest, keep_n_of_m, prunable, sparsity
from vitarium.errors import UsageError


@pytest.mark.parametrize("amount", [0.0, 0.13, 0.5, 0.999])
@pytest.mark.parametrize("together", [True, False])
def test_the_share_is_exact_even_with_ties(amount: float, together: bool):
    scores = {"a": torch.randint(0, 3, (7, 11)).float(), "b": torch.zeros(5), "c": torch.rand(3, 2, 2)}
    kept = keep_largest(scores, amount, together=together)
    gone = {name: int((~mask).sum()) for name, mask in kept.items()}
    if together:
        assert sum(gone.values()) == round(amount * (77 + 5 + 12))
    else:
        assert gone == {name: round(amount * score.numel()) for name, score in scores.items()}
    assert {name: mask.shape for name, mask in kept.items()} == {name: score.shape for name, score in scores.items()}


def test_the_smallest_go_and_of_equal_ones_the_first():
    kept = keep_largest({"a": torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])}, 0.4, together=True)["a"]
    assert kept.tolist() == [True, False, False, True, True]
    assert keep_n_of_m(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 5.0, 2.0, 9.0]]), 2, 4).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1)])
def test_zeros_survive_steps_and_the_others_learn(make):
    model = vitarium.apply(timm_model("vit"), "sparse_prune:amount=0.6", quiet=True)
    optimizer = make(model.parameters())
    for _ in range(2):  # momentum from before the pruning must not bring anything back
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    zeros = {name: weight == 0 for name, weight in prunable(model).items()}
    before = model.blocks[0].mlp.fc1.weight.detach().clone()
    handles = Masks.of(model).hold(optimizer)
    optimizer.step()
    optimizer.step()
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in prunable(model).items())
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before)
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert sparsity(model).share < 0.5


def test_what_may_be_pruned():
    names = list(prunable(timm_model("vit")))
    assert names[:3] == ["patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"]
    assert names[-1] == "head.weight"
    assert "norm.weight" not in names
    assert not any(name.endswith(("bias", "token", "embed")) for name in names)
    assert list(prunable(timm_model("vit"), ["blocks.1", "head"], ["norm", "*.qkv.*"])) == [
        "blocks.1.attn.proj.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.weight",
        "head.weight",
    ]
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.MultiheadAttention(4, 2))
    shared[1].weight = shared[0].weight
    assert list(prunable(shared)) == ["0.weight", "2.in_proj_weight", "2.out_proj.weight"]


def test_sparsity_counts_and_packs():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:, :6] = 0
        model[1].weight.zero_()
    found = sparsity(model)
    assert (found.zeros, found.total, found.bytes) == (48 + 32, 96, 96 * 4)
    assert found.packed_bytes == 8 + 16 * 4 + 4
    assert found.empty == ["1.weight"]
    with pytest.raises(UsageError, match="no pruning method is on this model"):
        Masks.of(model)
