"""Anatomy of open_clip's towers, if it is installed."""

from __future__ import annotations

import pytest
import torch

import vitarium
from tests.anatomy.models import fill
from vitarium import anatomy
from vitarium.efficiency.tokens.reducer import trace

open_clip = pytest.importorskip("open_clip")


@pytest.mark.parametrize("spec", ["evit:keep=0.5", "tome:r=2", "pitome:keep=0.8"])
@pytest.mark.parametrize("alone", [True, False])
def test_open_clip_towers(spec, alone):
    vision = dict(image_size=16, layers=3, width=24, patch_size=4, head_width=12, ls_init_value=0.1)
    text = dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
    model = fill(open_clip.model.CLIP(8, vision, text))
    model = model.visual if alone else model
    image = torch.randn(2, 3, 16, 16)

    def features() -> torch.Tensor:
        return model(image) if alone else model(image)[0]

    view = anatomy.of(model)
    assert (view.prefix, view.depth, view.patch_size) == (1, 3, (4, 4))
    with torch.no_grad():
        before = features()
        for neutral in ("tome:r=0", "evit:keep=1", "pitome:keep=1"):
            vitarium.apply(model, neutral, quiet=True)
            torch.testing.assert_close(features(), before, rtol=1e-5, atol=1e-6)
            vitarium.undo(model)
        vitarium.apply(model, spec, quiet=True)
        assert not torch.equal(features(), before)
        assert trace(model, image)[-1].place.shape[1] < 17
        assert torch.equal(vitarium.undo(model) and features(), before)


@pytest.mark.parametrize(
    "pool", [{}, dict(final_ln_after_pool=True), dict(pool_type="avg"), dict(attentional_pool=True, attn_pooler_heads=2)]
)
@torch.no_grad()
def test_features_of_towers_are_open_clips(pool):
    from vitarium.catalog.features import pooled_features
    from vitarium.catalog.open_clip_models import OpenClipTower

    vision = dict(image_size=16, layers=3, width=24, patch_size=4, head_width=12, **pool)
    clip = fill(open_clip.model.CLIP(8, vision, dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)))
    model, image = OpenClipTower(clip).eval(), torch.randn(2, 3, 16, 16)
    want = clip.encode_image(image)
    torch.testing.assert_close(model(image), want)
    torch.testing.assert_close(pooled_features(model, image), want)
    torch.testing.assert_close(pooled_features(clip, image), want)
    torch.testing.assert_close(pooled_features(clip.visual, image), want)
    features, maps = model.forward_intermediates(image, [0, 2])
    torch.testing.assert_close(features[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), maps[1])
    ((patches, first),) = model.forward_intermediates(image, 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(torch.cat([first, patches], 1), features)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert anatomy.of(model).depth == 3
