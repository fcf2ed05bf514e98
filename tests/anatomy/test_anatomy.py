"""Anatomy of every supported tower is correct; unsupported ones raise an error with the reason."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import vitarium
from tests.anatomy.models import NAMES, TIMM, TRANSFORMERS, make, prefix_of, timm_model
from vitarium import anatomy
from vitarium.anatomy import Site, SitedBlock, Tokens, carried, install
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.transformers_models import wrap
from vitarium.errors import AttachError, InputError, UnsupportedModel


def blank(view: anatomy.Anatomy) -> list[Site]:
    return [Site() for _ in view.blocks]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_wrapped_blocks_compute_what_the_original_computes(name, image):
    model = make(name)
    keys = list(model.state_dict())
    view = anatomy.of(model)
    assert (view.depth, view.prefix, view.grid(16, 16)) == (4, prefix_of(name), (4, 4))
    assert view.class_token == (view.prefix > 0)
    with torch.no_grad():
        before = model(image)
        install(model, blank)
        assert torch.equal(model(image), before)
    assert list(model.state_dict()) == keys
    assert all(isinstance(model.get_submodule(block.name), SitedBlock) for block in view.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_original(name, image):
    model = make(name)
    model(image).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install(model, blank)
    model(image).square().sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in want)
        if n in want:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-3, atol=1e-4 * float(want[n].abs().max() + 1e-6))


@pytest.mark.parametrize("name", ["timm-qk_norm", "timm-eva02", "transformers-vit"])
def test_qkv_and_projection_make_the_attention(name):
    model = make(name)
    block = anatomy.of(model).blocks[1]
    attention, x = block.attention, torch.randn(2, 9, 24)
    q, k, v = attention.qkv(x)
    assert q.shape == (2, attention.num_heads, 9, attention.head_dim)
    ours = attention.project(nn.functional.scaled_dot_product_attention(q, k, v, scale=attention.scale), x)
    theirs = attention.module(x)
    torch.testing.assert_close(ours, theirs[0] if isinstance(theirs, tuple) else theirs)


def test_refuses_what_it_does_not_know():
    import timm

    small = {k: v for k, v in TIMM.items() if k != "num_heads"}
    with pytest.raises(UnsupportedModel, match=r"Linear has no plain vision transformer in it; supported: timm's"):
        anatomy.of(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="Beit has no plain"):
        anatomy.of(timm.create_model("beit_base_patch16_224", num_heads=2, **small))
    with pytest.raises(UnsupportedModel, match=r"blocks\.0 is a ParallelThingsBlock"):
        anatomy.of(timm_model("vit", block_fn=timm.models.vision_transformer.ParallelThingsBlock))
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn is a DiffAttention"):
        anatomy.of(timm_model("vit", attn_layer="diff"))
    with pytest.raises(UnsupportedModel, match="2 vision transformers"):
        anatomy.of(nn.ModuleList([timm_model("vit"), timm_model("vit")]))
    with pytest.raises(UnsupportedModel, match="drops patches at random"):
        anatomy.of(timm_model("vit", patch_drop_rate=0.5))


def test_says_what_pyramids_lack():
    import timm
    import transformers

    swin = transformers.SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2)
    convnext = transformers.ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16])
    for build, reason in (
        (
            lambda: wrap(transformers.SwinForImageClassification(swin), Preprocessing(16)),
            r"SwinForImageC.* \(it is a pyramid with strides 2, 4 ",
        ),
        (lambda: transformers.SwinModel(swin), r"SwinModel has no .* \(it is a pyramid of 2 stages and has no single sequence of tokens\)"),
        (lambda: wrap(transformers.ConvNextForImageClassification(convnext), Preprocessing(16)), r"strides 4, 8 .*; it has no attention\)"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), r"strides 4, 8, 16, 32 "),
        (lambda: vitarium.create_model("convnext_pico"), r"strides .*; it has no attention\)"),
    ):
        with pytest.raises(UnsupportedModel, match=reason):
            anatomy.of(build())
    biased = transformers.BeitConfig(**TRANSFORMERS, use_relative_position_bias=True)
    with pytest.raises(UnsupportedModel, match="BeitModel adds a relative position bias to its attention"):
        anatomy.of(transformers.BeitForImageClassification(biased))


def test_refuses_a_part_that_no_layout_names():
    model = timm_model("vit")
    model.blocks[2].adapter = nn.Linear(24, 24)
    with pytest.raises(UnsupportedModel, match=r"blocks\.2 has a part 'adapter'"):
        anatomy.of(model)


def test_what_cannot_be_proven_is_taken_back(image):
    model = timm_model("vit")
    before = dict(model.named_modules())

    class Twice(type(model.blocks[1])):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    odd = Twice(24, 2).eval()
    model.blocks[1] = odd
    before = list(model.blocks)
    with pytest.raises(UnsupportedModel, match="is a Twice"):
        install(model, blank)
    Twice.__name__ = "Block"  # as an unnoticed change in the other library would look
    with pytest.raises(AttachError, match=r"blocks\.1 of the wrapped model differs from the original by .* with the method switched off"):
        install(model, blank)
    assert list(model.blocks) == before


def test_a_wrapped_block_shares_its_parts_with_the_original(image):
    model = timm_model("vit")
    replaced, _ = install(model, blank)
    model.blocks[0].mlp = nn.Identity()
    assert isinstance(replaced["blocks.0"].mlp, nn.Identity)
    twin = copy.deepcopy(model)
    twin.blocks[0].norm1.weight.data.zero_()
    assert model.blocks[0].norm1.weight.abs().sum() > 0
    assert model.half().blocks[1]._original[0].norm1.weight.dtype == torch.float16


def test_lost_history_is_told(image):
    model = timm_model("vit")
    install(model, blank)
    model.blocks[1].register_forward_hook(lambda m, i, out: out * 1)
    with pytest.raises(InputError, match=r"blocks\.2 got tokens without the state"):
        model(image)
    model = timm_model("vit")
    install(model, blank)
    with pytest.raises(InputError, match="causal"):
        model(image, is_causal=True)


def test_masks_are_honoured(image):
    model = timm_model("vit")
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    mask[..., 9:] = False
    with torch.no_grad():
        want = model(image, attn_mask=mask)
        install(model, blank)
        torch.testing.assert_close(model(image, attn_mask=mask), want)
        assert not torch.allclose(model(image), want, atol=1e-3)


def test_threads_do_not_meet(image):
    model = timm_model("vit")

    class Halve(Site):
        def between(self, tokens: Tokens, attended) -> None:
            keep = torch.arange(tokens.count - 1).expand(len(tokens.x), -1)
            assignment = torch.arange(tokens.count).clamp(max=tokens.count - 2).expand(len(tokens.x), -1)
            tokens.move(tokens.x[:, :-1].contiguous(), keep, assignment)

    install(model, lambda view: [Halve() for _ in view.blocks])
    images = [torch.randn(i + 1, 3, 16, 16) for i in range(6)]
    with torch.no_grad():
        alone = [model(x) for x in images]
        results: dict[int, torch.Tensor] = {}

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    results[i] = model(images[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[i], alone[i]) for i in range(6))


def test_the_state_frees_its_tensor(image):
    model = timm_model("vit")
    install(model, blank)
    seen = []
    model.blocks[3].register_forward_hook(lambda m, i, out: seen.append((weakref.ref(out), carried(out).originals)))
    gc.disable()
    try:
        with torch.no_grad():
            model(image)
        assert seen[0][0]() is None
        assert seen[0][1] == 17
    finally:
        gc.enable()
