"""Images of different token counts in one padded batch: for every token method, the output of an image equals that of the image alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.anatomy.models import timm_model, transformers_model
from vitarium import anatomy
from vitarium.anatomy import Tokens
from vitarium.efficiency.tokens.evit import EViT
from vitarium.efficiency.tokens.pitome import PiToMe, ToMe
from vitarium.efficiency.tokens.reducer import Reducer, trace
from vitarium.errors import InputError, UnsupportedModel

METHODS = [
    EViT(keep=0.6),
    EViT(keep=0.6, fuse=False),
    EViT(tokens=(9, 5), blocks=(0, 2)),
    ToMe(r=3),
    ToMe(r=(5, 0, 4)),
    ToMe(r=3, proportional=False),
    PiToMe(keep=0.75),
    PiToMe(keep=0.8, protect="all", proportional=True),
    PiToMe(keep=0.8, prune=True),
]
LENGTHS = (17, 10, 17, 6, 13)


def model_of(name: str = "vit", dtype: torch.dtype = torch.float64, **arguments) -> nn.Module:
    return timm_model(name, img_size=20, **arguments).to(dtype).eval()


def batch(dtype: torch.dtype = torch.float64, *, holes: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens (5, 18, 24), class token first, and their mask; padding is filled with large numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LENGTHS), 18, 24, generator=generator, dtype=dtype)
    mask = torch.arange(17) < torch.tensor(LENGTHS)[:, None]
    if holes:
        mask = torch.stack([row[torch.randperm(17, generator=generator)] for row in mask])
    mask = torch.cat((mask.new_ones(len(mask), 1), mask), 1)
    return x.masked_fill(~mask[..., None], 50.0), mask


@pytest.mark.identity
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_padded_equals_packed(method: Reducer, holes: bool):
    model = model_of()
    vitarium.apply(model, method, quiet=True)
    x, mask = batch(holes=holes)
    with torch.no_grad():
        state = anatomy.run(model, x, mask)
        for i, real in enumerate(mask):
            alone = anatomy.run(model, x[i : i + 1, real])
            count = int(state.counts[i])
            assert count == alone.count
            torch.testing.assert_close(state.x[i, :count], alone.x[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.mean()[i], alone.mean()[0], rtol=1e-10, atol=1e-10)
            where = real.nonzero()[:, 0]
            assert torch.equal(state.source[i, where], alone.source[0])
            assert (state.source[i, ~real] == -1).all()
            assert torch.equal(state.place[i, :count], torch.where(alone.place[0] < 0, -1, where[alone.place[0].clamp(min=0)]))
            if alone.size is not None:
                assert torch.equal(state.size[i, :count], alone.size[0])
                assert state.size[i].sum() == real.sum()  # no padding was merged
                assert (state.size[i, count:] == 0).all()
    assert state.mask is None or torch.equal(state.mask.sum(1), state.counts)


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[3:4], ids=str)
def test_float32_agrees_to_rounding_and_gradients_reach_real_tokens_alone(method: Reducer):
    model = model_of(dtype=torch.float32)
    vitarium.apply(model, method, quiet=True)
    x, mask = batch(torch.float32)
    x.requires_grad_(True)
    state = anatomy.run(model, x, mask)
    for i, real in enumerate(mask):
        alone = anatomy.run(model, x[i : i + 1, real])
        torch.testing.assert_close(state.x[i, : alone.count], alone.x[0], rtol=1e-5, atol=1e-5)
    state.mean().sum().backward()
    assert (x.grad.abs().sum(2) > 0).equal(mask)


@pytest.mark.identity
@pytest.mark.parametrize("method", [None, *METHODS], ids=str)
def test_a_mask_that_is_true_everywhere_changes_no_bit(method: Reducer | None):
    model = model_of(dtype=torch.float32)
    if method is not None:
        vitarium.apply(model, method, quiet=True)
    x, mask = batch(torch.float32)
    with torch.no_grad():
        plain, masked = anatomy.run(model, x), anatomy.run(model, x, torch.ones_like(mask))
        assert torch.equal(plain.x, masked.x)
        assert masked.mask is None
        images = torch.randn(2, 3, 20, 20)
        logits = model(images)
        with anatomy.masked(model, torch.ones(2, 25, dtype=torch.bool)):
            assert torch.equal(model(images), logits)


@pytest.mark.parametrize("name", ["vit", "layer_scale", "qk_norm", "registers", "distilled", "eva", "dinov3"])
@pytest.mark.parametrize("method", [None, EViT(keep=0.5, fuse=False, score="mean"), ToMe(r=2)], ids=str)
def test_whole_models_take_a_mask_of_their_patches(name: str, method: Reducer | None):
    """The content of hidden patches does not matter; the model is unchanged afterwards."""
    model = timm_model(name, global_pool="token").double()
    if method is not None:
        vitarium.apply(model, method, quiet=True)
    before = list(model.named_modules())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    mask = torch.rand(3, 16) > 0.4
    mask[:, 0] = True
    patches = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(patches, images, torch.randn(3, 3, 16, 16, dtype=torch.float64))
    with torch.no_grad():
        plain = model(images)
        with anatomy.masked(model, mask):
            first, second = model(images), model(other)
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(first, plain)
        assert torch.equal(model(images), plain)
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in before]


def test_transformers_models_and_ours_take_a_mask():
    for model in (transformers_model("dinov2"), vitarium.create_model("thorax_mae_pico").eval()):
        images = torch.randn(2, 3, 16, 16)
        mask = torch.ones(2, 16, dtype=torch.bool)
        mask[1, 8:] = False
        view = anatomy.of(model)
        if view.reads_patches:
            with pytest.raises(UnsupportedModel, match=r"pools all image tokens.*Tokens\.mean"), anatomy.masked(model, mask):
                pass
            continue
        with torch.no_grad(), anatomy.masked(model, mask):
            assert torch.equal(model(images)[:1], model(images[[0, 1]])[:1])


def test_the_trace_of_a_padded_batch_keeps_the_books():
    model = model_of(global_pool="token")
    vitarium.apply(model, ToMe(r=4), quiet=True)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[1, 10:] = False
    with anatomy.masked(model, mask):
        states = trace(model, torch.randn(2, 3, 20, 20, dtype=torch.float64))
    assert [state.mask.sum(1).tolist() for state in states] == [[22, 7], [18, 4], [14, 3], [10, 2]]
    assert all((state.size.sum((1, 2)) == torch.tensor([26.0, 11.0])).all() for state in states)


def test_masks_that_do_not_fit_are_refused():
    model = model_of()
    x, mask = batch()
    with pytest.raises(InputError, match=r"bool, \(5, 18\) or \(5, 17\) without the 1 tokens.*got torch.bool \(5, 9\)"):
        anatomy.run(model, x, mask[:, :9])
    with pytest.raises(InputError, match=r"got torch.float32"):
        anatomy.run(model, x, mask.float())
    with pytest.raises(InputError, match="hides one of the 1 class"):
        anatomy.run(model, x, mask & (torch.arange(18) > 0))
    with pytest.raises(InputError, match="leaves image 3 of the batch no token"):
        anatomy.run(model, x, mask & (torch.arange(5) != 3)[:, None] | (torch.arange(18) == 0))


def test_the_mean_counts_real_tokens_by_the_originals_that_they_represent():
    x = torch.tensor([[[9.0], [1.0], [4.0], [100.0]]])
    mask = torch.tensor([[True, True, True, False]])
    assert Tokens(x, 1, 5, size=torch.tensor([[[1.0], [3.0], [1.0], [0.0]]]), mask=mask).mean().item() == pytest.approx(7 / 4)
    assert Tokens(x, 1, 5, mask=mask).mean().item() == 2.5
    assert Tokens(x, 1, 5).mean().item() == pytest.approx(35)
