"""EViT: equality with the authors' code, and exact properties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.anatomy.models import timm_model
from tests.efficiency.tokens.goldens import assert_model_matches
from vitarium.anatomy import Tokens
from vitarium.efficiency.tokens.evit import EViT, annealed_keep
from vitarium.efficiency.tokens.reducer import trace


def kept(states: list[Tokens], block: int, fuse: bool) -> Tensor:
    """(B, L): which of the image tokens that entered a block stayed, in their new order; the last one may be the fused token of before."""
    new, old = states[block].place, states[block - 1].place
    if old is None:
        old = torch.arange(states[0].originals).expand(len(new), -1)
    new = new[:, 1:-1] if fuse else new[:, 1:]
    return (new[:, :, None] == old[:, None, 1:]).int().argmax(2)


@pytest.mark.parametrize(
    ("golden", "method"),
    [
        ("evit-deit_small_r07_fuse", EViT(keep=0.7)),
        ("evit-tiny_r05_drop_224", EViT(keep=0.5, fuse=False)),
        ("evit-tiny_r06_fuse_160_interp", EViT(keep=0.6, blocks=(2, 5, 8))),  # a model for 224 pixels at 160
    ],
)
def test_equals_the_authors_model(golden: str, method: EViT):
    def run(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        states = trace(model, image)
        blocks = method.blocks or (3, 6, 9)
        return {"logits": model(image)} | {f"kept{i}": kept(states, block, method.fuse).double() for i, block in enumerate(blocks)}

    assert_model_matches(golden, method, run)


@pytest.mark.identity
def test_token_counts_at_keep_07():
    model = timm_model("vit", img_size=56, depth=12)
    vitarium.apply(model, EViT(), quiet=True)
    states = trace(model, torch.randn(1, 3, 56, 56))
    assert states[2].place is None
    assert [states[i].place.shape[1] - 1 for i in (3, 6, 9, 11)] == [139, 99, 71, 71]


@pytest.mark.identity
def test_keep_one_is_the_unmodified_model_bit_for_bit():
    model, image = timm_model("vit"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(image)
        assert torch.equal(vitarium.apply(model, EViT(keep=1), quiet=True)(image), before)


@pytest.mark.identity
@pytest.mark.parametrize("fuse", [True, False])
def test_the_order_of_the_patches_does_not_matter(fuse: bool):
    model = vitarium.apply(timm_model("vit").double(), EViT(keep=0.5, fuse=fuse), quiet=True)
    tokens = torch.randn(2, 17, 24, dtype=torch.float64)
    order = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(16)))
    with torch.no_grad():
        straight, mixed = (model.forward_head(model.norm(model.blocks(x))) for x in (tokens, tokens[:, order]))
    torch.testing.assert_close(straight, mixed, rtol=0, atol=1e-10)


@pytest.mark.identity
def test_the_fused_token_is_the_attention_weighted_sum_of_the_others():
    model = timm_model("vit").double()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    block = model.blocks[1]
    with torch.no_grad():
        q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        score = (q @ k.transpose(-1, -2) * 12**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
        y = x + block.attn(block.norm1(x))
        image = y[:, 1:]
        order = score.argsort(dim=1, descending=True)
        kept_tokens = torch.stack([image[i, order[i, :8]] for i in range(2)])
        fused = torch.stack([(score[i, order[i, 8:], None] * image[i, order[i, 8:]]).sum(0, keepdim=True) for i in range(2)])
        want = torch.cat((y[:, :1], kept_tokens, fused), dim=1)
        want = want + block.mlp(block.norm2(want))
        vitarium.apply(model, EViT(keep=0.5, blocks=(1,)), quiet=True)
        model.blocks[1].index = 0  # called alone
        torch.testing.assert_close(model.blocks[1](x), want, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_dropping_tokens_that_nobody_looks_at_changes_nothing():
    """Values of zero and keys that get no weight: the logits are those of the whole image."""
    model = timm_model("vit").double()
    tokens = torch.randn(1, 17, 24, dtype=torch.float64)
    for block in model.blocks:  # queries and keys see channel 0 alone; the last 8 tokens hold a value there that softmax sends to zero
        nn.init.zeros_(block.attn.qkv.weight[:48])
        nn.init.zeros_(block.attn.qkv.bias[:48])
    masked = torch.zeros(1, 1, 1, 17, dtype=torch.float64)
    masked[..., 9:] = -torch.inf
    with torch.no_grad():
        want = tokens
        for block in model.blocks:
            want = block(want, attn_mask=masked)
        got = tokens[:, :9]
        for block in model.blocks:
            got = block(got)
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=0, atol=1e-10)


def test_numbers_of_tokens_and_other_scores():
    model, image = timm_model("vit"), torch.randn(2, 3, 16, 16)
    vitarium.apply(model, EViT(blocks=(0, 2), tokens=(9, 4), fuse=False), quiet=True)
    assert [s.place.shape[1] - 1 for s in trace(model, image)] == [9, 9, 4, 4]
    vitarium.undo(model)
    vitarium.apply(model, "evit:score=mean,keep=0.5,blocks=[1]", quiet=True)
    assert trace(model, image)[-1].place.shape[1] - 1 == 9


def test_the_keep_rate_falls_along_a_cosine():
    rates = [annealed_keep(step, keep=0.7, start=10, steps=100) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1, 1, 1, 0.85, 0.7, 0.7])
    assert annealed_keep(10, keep=0.7, start=10, steps=0) == 0.7
