"""Tests specific to DependencyViT; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import assert_matches_golden
from vitarium.backbones.dependencyvit import (
    DependencyViT,
    Flow,
    ReversedAttention,
    build_tree,
    kept_shares,
    start,
)
from vitarium.backbones.dependencyvit.attention import MessageController
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.catalog.probe import macs_of
from vitarium.nn import Attention


def outputs(model: DependencyViT, tokens: Tensor) -> dict[str, Tensor]:
    flow = start(tokens)
    first = model.blocks[0]
    x = first.norm1(tokens)
    _, _, received = first.attn(x, flow.messages, True)
    mask = first.attn.dependency_mask(x, flow.messages)
    *_, last = model.flow(flow)
    return {
        "dependency_mask_0": mask,
        "received_mass_0": received,
        "messages_sorted": last.messages.sort(-1, descending=True).values,
        "kept": torch.tensor([float(last.tokens.shape[1])]),
        "logits": model.forward_head(model.norm(last)),
    }


def from_tokens(**options) -> DependencyViT:
    """The model without patch embedding, as in the goldens, whose tokens include positions."""
    model = vitarium.create_model("dependencyvit_tiny", embed_dim=48, message_bias=0.0, pool="mean", **options)
    del model.patch_embed, model.pos_embed
    return model


def test_equals_the_cards_formulas():
    assert_matches_golden("dependencyvit-reversed_attention", from_tokens(num_heads=4, depth=4, num_classes=10), outputs)


def test_equals_the_cards_formulas_with_pruning():
    options = dict(num_heads=6, depth=6, num_classes=7, prune_blocks=(1, 3, 4), prune_share=0.16)
    assert_matches_golden("dependencyvit-lite", from_tokens(**options), outputs)


@pytest.mark.parametrize(
    ("name", "millions", "giga"), [("tiny", 5.96, 1.30), ("small", 22.99, 4.76), ("lite_tiny", 5.96, 0.85), ("lite_small", 22.99, 3.14)]
)
def test_parameters_and_macs_of_the_card(name: str, millions: float, giga: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"dependencyvit_{name}").eval()
        image = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert macs_of(model, image) / 1e9 == pytest.approx(giga, abs=0.012)


# ---- the operator


def literal(part: ReversedAttention, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Literal implementation with the matrix A^R, also the reference for benchmarks."""
    batch, count, dim = x.shape
    q, k, v = part.qkv(x).reshape(batch, count, 3, part.num_heads, part.head_dim).permute(2, 0, 3, 1, 4)
    forward = (q @ k.transpose(-2, -1) * part.head_dim**-0.5).softmax(-1)
    p = (part.head_selector(x) / 0.1).softmax(-1).transpose(1, 2)
    m = messages * part.message_controller(x)
    backward = (forward * p[..., None] * m[:, None, :, None]).transpose(-2, -1)
    out = part.proj((backward @ v).transpose(1, 2).reshape(batch, count, dim))
    return out, m, backward.abs().sum((1, 3))


def reference(model: DependencyViT) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same model with attention by the equations above."""

    def in_words(part: ReversedAttention, x: Tensor, messages: Tensor, count: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        out, sent, received = literal(part, x, messages)
        return out, sent, received if count else None

    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attn.forward = functools.partial(in_words, block.attn)
    return lambda image: twin(image)


@pytest.mark.identity
@pytest.mark.parametrize("name", ["dependencyvit_pico", "dependencyvit_lite_pico"])
def test_the_whole_model_equals_itself_in_the_cards_words(name: str):
    model = small(name)
    torch.testing.assert_close(model(images()), reference(model)(images()), rtol=0, atol=1e-11)


def attention(heads: int = 3, **options) -> ReversedAttention:
    torch.manual_seed(0)
    part = ReversedAttention(24, heads, **options).double().eval()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.2)
    return part


def tokens(batch: int = 2, count: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, count, 24, dtype=torch.float64, generator=generator)
    return x, torch.rand(batch, count, dtype=torch.float64, generator=generator)


@pytest.mark.identity
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}])
def test_equals_the_literal_words(options: dict):
    part, (x, messages) = attention(**options), tokens()
    for got, want in zip(part(x, messages, True), literal(part, x, messages), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_a_child_sends_as_much_as_its_messages_say():
    part, (x, messages) = attention(), tokens()
    mask = part.dependency_mask(x, messages)
    _, sent, received = part(x, messages, True)
    torch.testing.assert_close(mask.sum(1), sent)  # [parent, child]: columns
    torch.testing.assert_close(mask.sum(2), received)
    assert (sent <= messages).all()


@pytest.mark.identity
def test_one_head_and_all_messages_is_attention_transposed():
    part, (x, _) = attention(heads=1, message_bias=1e4), tokens()
    q, k, v = part.qkv(x).chunk(3, -1)
    attended = (q @ k.transpose(-2, -1) * 24**-0.5).softmax(-1)
    out, sent, _ = part(x, x.new_ones(2, 13))
    assert (sent == 1).all()
    torch.testing.assert_close(out, part.proj(attended.transpose(-2, -1) @ v), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_where_attention_is_symmetric_it_is_ordinary_attention():
    """Queries equal to keys on a ring of equal steps: F is circulant and symmetric, hence doubly stochastic."""
    part, plain = attention(heads=1, message_bias=1e4), Attention(24, 1, qkv_bias=False).double()
    part.qkv.weight.data[24:48] = part.qkv.weight.data[:24]
    angle = torch.arange(13, dtype=torch.float64) * 2 * torch.pi / 13
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    frame = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0][:, :2]
    part.qkv.weight.data[:48] = torch.cat([frame, frame.new_zeros(24, 22)], 1).repeat(2, 1)
    x = torch.cat([ring, torch.randn(13, 22, dtype=torch.float64)], -1)[None]
    plain.qkv.load_state_dict(part.qkv.state_dict())
    plain.proj.load_state_dict(part.proj.state_dict())
    torch.testing.assert_close(part(x, x.new_ones(1, 13))[0], plain(x), rtol=0, atol=1e-12)


# ---- the model


def small(name: str = "dependencyvit_pico", **options) -> DependencyViT:
    torch.manual_seed(0)
    model = vitarium.create_model(name, num_classes=5, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.identity
def test_a_token_that_stopped_sending_sends_nothing_later():
    model = small(message_bias=0.0)
    before = torch.ones(2, 16, dtype=torch.float64)
    for flow in model.forward_stages(images()):
        assert (flow.messages <= before).all()
        assert (flow.messages > 0).all()
        before = flow.messages


@pytest.mark.identity
def test_pruning_no_token_changes_nothing():
    model, same = small(), small(prune_blocks=(1, 2), prune_share=0.0)
    torch.testing.assert_close(same(images()), model(images()), rtol=0, atol=0)


@pytest.mark.identity
@pytest.mark.parametrize("name", ["dependencyvit_pico", "dependencyvit_lite_pico"])
def test_tokens_have_no_order(name: str):
    model = small(name)
    x = torch.randn(2, 16, 64, dtype=torch.float64)
    order = torch.randperm(16)
    *_, last = model.flow(start(x))
    *_, moved = model.flow(start(x[:, order]))
    torch.testing.assert_close(moved.restored(), last.restored()[:, order], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.norm(moved).mean(1), model.norm(last).mean(1), rtol=0, atol=1e-10)


@pytest.mark.identity
def test_the_feature_is_the_mean_weighed_by_messages():
    for pool in ("weighted", "mean"):
        for name in ("dependencyvit_pico", "dependencyvit_lite_pico"):
            model = small(name, pool=pool)
            *_, last = model.forward_stages(images())
            x = nn.functional.layer_norm(last.tokens, (64,), model.norm.weight, model.norm.bias, 1e-6)
            total = (last.messages[..., None] * x).sum(1)
            want = total / (last.messages.sum(1, keepdim=True) if pool == "weighted" else x.shape[1])
            got = model.forward_head(model.forward_features(images()), pre_logits=True)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_messages_too_small_for_numbers_leave_no_hole():
    model = small(message_bias=-1e4)
    assert torch.isfinite(model(images())).all()
    assert torch.isfinite(model.float()(images().float())).all()


def test_fresh_messages_arrive():
    """Message mass after the default initialisation of the controllers, and after the port's, which is close to zero."""
    torch.manual_seed(0)
    arrived = {}
    for bias in (4.0, 0.0):
        model = vitarium.create_model("dependencyvit_tiny", image_size=32, message_bias=bias).eval()
        *_, last = model.forward_stages(torch.randn(1, 3, 32, 32))
        arrived[bias] = last.messages.mean().item()
    assert arrived[4.0] == pytest.approx(0.8, abs=0.05)
    assert arrived[0.0] < 1e-3
    assert MessageController(8, 4.0).bias == 4.0


def test_tokens_really_leave():
    """The MLP of a pruning block and all later blocks process fewer tokens; pruned tokens keep their last value."""
    model = small("dependencyvit_lite_pico")
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    flows: list[Flow] = list(model.forward_stages(images()))
    assert seen == [16, 12, 8, 8]
    first, last = flows[1], flows[-1]
    assert last.place.shape == (2, 8)
    gone = [i for i in range(16) if i not in first.place[0].tolist()]
    assert len(gone) == 4
    assert torch.equal(last.restored()[0, gone], first.restored()[0, gone])
    assert torch.equal(last.restored()[0, last.place[0]], last.tokens[0])
    with torch.no_grad():
        _, _, received = model.blocks[1].attn(model.blocks[1].norm1(flows[0].tokens), flows[0].messages, True)
    assert set(gone) == set(received[0].argsort()[:4].tolist())
    weights = model.forward_features(images())[0].abs().sum(1)
    assert sorted(last.place[0].tolist()) == weights.nonzero()[:, 0].tolist()


def test_pruning_by_messages():
    model = small(prune_blocks=(0,), prune_share=0.5, prune_by="messages")
    flow = next(iter(model.forward_stages(images())))
    _, messages, _ = model.blocks[0].attn(model.blocks[0].norm1(model.embed(images()).tokens), torch.ones(2, 16).double())
    assert set(flow.place[0].tolist()) == set(messages[0].argsort()[8:].tolist())


def test_kept_shares_are_the_papers():
    kept = 196
    left = []
    for share in kept_shares(12, (1, 4, 7, 10), 0.16):
        if share < 1:
            kept = int(share * kept)
            left.append(kept / 196)
    assert left == pytest.approx([0.84, 0.68, 0.52, 0.36], abs=0.01)


def test_a_vits_weights_fill_what_is_shared(tmp_path: Path):
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    model = vitarium.create_model("dependencyvit_tiny", image_size=48, num_classes=5, num_heads=3, qkv_bias=True)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    report = load_checkpoint(model, tmp_path / "vit.pth", strict=False)
    assert report.dialect == "timm"
    assert not report.unexpected
    assert not report.mismatched
    assert all(any(word in name for word in ("head_selector", "message_controller", ".ls")) for name in report.missing)
    assert torch.equal(model.blocks[3].attn.qkv.bias, vit.blocks[3].attn.qkv.bias)
    assert [r.split()[0] for r in report.resized] == ["pos_embed"]


# ---- the tree


@pytest.mark.parametrize("name", ["dependencyvit_pico", "dependencyvit_lite_pico"])
def test_a_forward_pass_returns_the_dependencies(name: str):
    model = small(name)
    logits, found = model(images(height=20, width=13), return_dependency=True)
    torch.testing.assert_close(logits, model(images(height=20, width=13)), rtol=0, atol=1e-12)
    assert found.grid == (5, 4)
    assert found.messages.shape == (2, 20)
    for mask, place in zip(found.masks, found.places, strict=True):
        assert mask.shape == (2, place.shape[1], place.shape[1])
    mean = found.mean_mask()
    assert mean.shape == (2, 20, 20)
    one = mean.new_zeros(20, 20)
    for mask, place in zip(found.masks, found.places, strict=True):
        one[place[1][:, None], place[1]] += mask[1] / 4
    torch.testing.assert_close(mean[1], one, rtol=0, atol=1e-12)
    *_, last = model.forward_stages(images(height=20, width=13))
    places = torch.arange(20).expand(2, -1) if last.place is None else last.place
    torch.testing.assert_close(found.messages.gather(1, places), last.messages)
    with pytest.raises(ValueError, match="to 3"):
        found.mean_mask([4])
    with pytest.raises(ValueError, match="one or more"):
        found.mean_mask([])


def test_trees_of_a_batch():
    model = small()
    _, found = model(images(), return_dependency=True)
    one, two = model.dependency_trees(images())
    for tree, index in ((one, 0), (two, 1)):
        again = build_tree(found, index)
        assert (tree.parent == again.parent).all()
        mean = found.mean_mask()[index].detach()
        assert tree.root == int(mean.sum(1).argmax())
        without = mean.clone().fill_diagonal_(-1)
        assert (tree.strength <= without.amax(0).numpy() + 1e-12).all()
    last = build_tree(found, 0, layers=[-1])
    assert last.parent.shape == (16,)


def test_errors_name_what_is_accepted():
    for options, words in [
        ({"pool": "max"}, "pool must be one of weighted, mean"),
        ({"prune_by": "luck"}, "prune_by must be one of received, messages"),
        ({"prune_blocks": (4,), "prune_share": 0.1}, "0 to 3"),
        ({"prune_blocks": (1, 1), "prune_share": 0.1}, "distinct"),
        ({"prune_blocks": (1, 2), "prune_share": 0.5}, "tokens remain"),
        ({"num_heads": 5}, "divisible by num_heads"),
    ]:
        with pytest.raises(ValueError, match=words):
            vitarium.create_model("dependencyvit_pico", **options)


def test_copies_prune_alike():
    model = small("dependencyvit_lite_pico")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
